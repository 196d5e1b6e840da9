"""Rows of the zoo as a page of Markdown: the sums, every exception with its cause, the tables."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lora_fx.tools.bench.measure import machine
from lora_fx.tools.zoo.row import GRADIENT_TOLERANCE, Row

__all__ = ["exceptions", "page", "summary", "table"]

_HEAD = """# The zoo

Written by `make zoo`; nobody edits it. Every model is built at a small size with random weights,
seeded, and goes the whole way in a process of its own: `plan` and `rewrite` with
`LoraConfig(r=4, target_modules=None)`, the front-end chosen by `auto`; twenty steps of AdamW against
random targets; `merge`; `export_onnx`. What each column means is written below the tables.
"""
_LEGEND = """## Columns

- **front-end**: what captured it.
- **found, adapted, refused**: linear operations. What is neither adapted nor refused is the output
  head or an embedding, which `target_modules=None` leaves alone.
- **outputs**: of the rewritten model beside the original, in eval mode: `same bits`, or the largest
  difference relative to the largest value.
- **train mode**: the same with the same seed in train mode. `other draws`: the model draws random
  numbers there, and the rewritten one draws them in another order.
- **gradients**: `ok` where adapters and nothing else have one, finite, and that of every B is what
  the chain rule makes of the gradient of the original's weight (grouped and transposed convolutions
  and experts are looked at for presence only). `n idle`: weights without a gradient in the original,
  too: the call does not come to them or drops what they compute.
- **loss**: before the first step and after the last.
- **merge**: largest difference between merged and adapted, relative; with fp64 beside it where fp32
  amplifies roundings beyond 1e-5. `own class` is part of it: the original's classes and names.
- **torch.onnx**: whether `torch.onnx.export(dynamo=True)` exports the original, without adapters.
- **export**: the merged model by `export_onnx`: the largest relative difference between the file in
  ONNX Runtime and PyTorch.
- **unseen**: weights that a counter below autograd sees in a linear operation and the plan does not
  mention; their number of all that it sees.
"""
_COLUMNS = (
    "model",
    "front-end",
    "found",
    "adapted",
    "refused",
    "outputs",
    "train mode",
    "gradients",
    "loss",
    "merge",
    "torch.onnx",
    "export",
    "unseen",
    "seconds",
)
_PACKAGES = ("torchvision", "timm", "diffusers", "onnxruntime", "onnxruntime-gpu", "onnxscript")
_DRAWS = 1e-4  # beyond rounding


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    facts = {**machine(), "also": ", ".join(_versions())}
    lines = [_HEAD]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    minutes = sum(row.total_seconds for row in rows) / 60
    lines += [f"- {len(rows)} models, {minutes:.0f} minutes one after the other"]
    lines += ["", "## Sums", ""]
    lines += [f"- {line}" for line in summary(rows)]
    lines += ["", "## Exceptions", ""]
    lines += [f"- {line}" for line in exceptions(rows)] or ["None."]
    failed = list(_not_by_torch(rows))
    if failed:
        lines += ["", "## What torch.onnx does not export without adapters", ""]
        lines += [f"- {line}" for line in failed]
    for group in dict.fromkeys(row.group for row in rows):
        chosen = [row for row in rows if row.group == group]
        lines += ["", f"## {group} ({len(chosen)})", "", *table(chosen)]
    lines += ["", _LEGEND, "## What is refused, and why", ""]
    lines += _reasons(rows)
    return "\n".join(lines).rstrip() + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """The sums, one sentence each."""
    total = len(rows)
    operations = sum(row.adapted for row in rows)
    bits = sum(row.output_error == 0.0 for row in rows)
    counted = sum(row.counted or 0 for row in rows)
    missed = sum(len(row.unseen) for row in rows)
    rewritten, trained, merged = (
        sum(getattr(row, what) for row in rows) for what in ("rewritten", "trained", "merged")
    )
    found, refused = (sum(getattr(row, what) for row in rows) for what in ("found", "rejected"))
    lines = [
        f"{rewritten} of {total} rewritten: {bits} without a changed bit, the others within 1e-6",
        f"{trained} of {total} trained: gradients as they should be, and the loss fell",
        f"{merged} of {total} merged: the adapted model, as the own class",
        f"{operations} of {found} operations adapted, {refused} refused with a reason",
        f"{counted} weights counted, {missed} of them unseen by the plan",
    ]
    tried = [row for row in rows if row.torch_onnx is not None]
    if tried:
        able = [row for row in tried if row.torch_onnx]
        both = sum(bool(row.exported) for row in able)
        only = sum(bool(row.exported) for row in tried if not row.torch_onnx)
        lines.append(
            f"{both} of {len(able)} that torch.onnx exports without adapters also export merged, "
            f"with parity; {only} of the {len(tried) - len(able)} that it does not export, too"
        )
    return lines


def exceptions(rows: Sequence[Row]) -> list[str]:
    """Everything that is not as it should be, with its cause in one line."""
    return [
        f"{row.name}: {line}" + (f" ({row.note})" if row.note else "")
        for row in rows
        for line in _exceptions(row)
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """One group's table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return [*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)]


def _exceptions(row: Row) -> Iterator[str]:
    for stage, error in row.errors.items():
        if stage == "rewrite" and row.errors.get("plan") == error:
            continue
        if stage == "torch.onnx" or (stage == "export_onnx" and not row.torch_onnx):
            continue  # these have a list of their own
        yield f"{stage}: {_escaped(error)}"
    if row.argument:
        yield f"changed its argument: {row.argument}"
    if row.output_error is not None and row.output_error > 1e-6:
        yield f"outputs differ by {row.output_error:.1e}"
    for what, names in (
        ("a gradient where there should be none", row.stray),
        ("no gradient, though the original has one", row.missing),
        ("gradient is not finite", row.infinite),
        ("unseen by the plan", row.unseen),
    ):
        if names:
            yield f"{what}: {_some(names)}"
    if row.gradient_error > GRADIENT_TOLERANCE:
        yield f"gradient of {row.gradient_worst} is off by {row.gradient_error:.1e}"
    if row.losses is not None and not row.losses[1] < row.losses[0]:
        yield f"the loss did not fall: {row.losses[0]:.3g} to {row.losses[1]:.3g}"
    if row.merge_error is not None and not row.merged:
        own = "" if row.own_class else "; not of its own class"
        yield f"merged differs by {row.merge_error:.1e}{own}"


def _not_by_torch(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "torch.onnx" in row.errors:
            ours = "exported by export_onnx" if row.exported else row.errors.get("export_onnx", "")
            yield _escaped(f"{row.name}: {row.errors['torch.onnx']}; {ours or 'not rewritten'}")


def _cells(row: Row) -> Iterator[str]:
    yield row.name.partition("/")[2]
    yield row.frontend or "none"
    yield from (str(number) for number in (row.found, row.adapted, row.rejected))
    yield _difference(row.output_error)
    train = row.train_error
    yield "other draws" if train is not None and train > _DRAWS else _difference(train)
    yield _gradients(row)
    yield "" if row.losses is None else f"{row.losses[0]:.2f} to {row.losses[1]:.2f}"
    merged = "" if row.merge_error is None else f"{row.merge_error:.0e}"
    if row.merge_error_fp64 is not None:
        merged += f" (fp64 {row.merge_error_fp64:.0e})"
    yield merged
    yield _yes_no(row.torch_onnx)
    yield f"{row.parity:.0e}" if row.exported and row.parity is not None else _yes_no(row.exported)
    yield "" if row.counted is None else f"{len(row.unseen)} of {row.counted}"
    yield f"{row.total_seconds:.0f}"


def _gradients(row: Row) -> str:
    if row.output_error is None or "gradients" in row.errors:
        return ""
    wrong = len(row.stray) + len(row.missing) + len(row.infinite)
    if wrong or row.gradient_error > GRADIENT_TOLERANCE:
        return "see above"
    return f"ok, {len(row.unreached)} idle" if row.unreached else "ok"


def _reasons(rows: Sequence[Row]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.reasons.values():
            names = by_reason.setdefault(_escaped(reason), [])
            if row.name not in names:
                names.append(row.name)
    ordered = sorted(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [f"- {reason} ({_some(names)})" for reason, names in ordered] or ["Nothing."]


def _difference(value: float | None) -> str:
    if value is None:
        return ""
    return "same bits" if value == 0.0 else f"{value:.0e}"


def _yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _escaped(text: str) -> str:
    """An error for a table, without the folders of the machine; a line may end within a path."""
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.])|\s*(?:File )?\"?/[\w./+-]*$", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def _versions() -> Iterator[Any]:
    for package in _PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
