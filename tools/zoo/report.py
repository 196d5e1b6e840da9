"""Markdown page of the zoo's rows: the sums, every exception with its cause, the tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.errors import some
from lora_fx.export.fuse import FUSIONS
from lora_fx.tools.bench.measure import machine, markdown, version_of

__all__ = [
    "MERGE_TOLERANCE",
    "PARTS",
    "Row",
    "RuntimeFile",
    "exceptions",
    "page",
    "runtime_table",
    "scrubbed",
    "summary",
    "table",
]


MERGE_TOLERANCE = 1e-5
"""Allowed difference of a merged model in fp32, relative to the largest output."""

EXPORT = ("torch.onnx", "export_onnx")
"""The stages that ``--no-onnx`` leaves out, because they take most of the time."""

PARTS = ("adaption", "export", "runtime")
"""Parts of a row, each with its date: the other stages, ``EXPORT``, exports with ONNX Runtime's operators."""

_FIELDS = {
    "export": ("torch_onnx", "exported", "parity", "fewer_fusions"),
    "runtime": ("runtime",),
}
"""Fields of a row by the part that sets them. The first part sets the other fields."""

V = TypeVar("V")


@dataclass
class RuntimeFile:
    """A file with the operators of ONNX Runtime.

    Attributes:
        parity: Largest relative difference between the file and PyTorch.
        nodes: Number of nodes.
        fused: Number of applications of each fusion, by its name.
        left: The reason why a fusion, or a level of fusions, was not applied, by its name.
        fewer: The reason why the file has fewer fusions than requested.
    """

    parity: float
    nodes: int
    fused: dict[str, int]
    left: dict[str, str]
    fewer: str = ""


@dataclass
class Row:
    """Results of one model. Fields of a stage that failed keep their defaults.

    Attributes:
        name, group, note: Fields of the entry.
        stage: The stage that began last. If the job's process crashed or hung, it did so in this stage.
        model: Class of the model.
        parameters: Number of elements of the model's parameters.
        frontend: The front-end that captured the model. ``frontend_notes`` says why others did not.
        found, adapted, rejected: Number of linear operations, and of those adapted and refused.
        reasons: The reason of each rejected operation, by its name.
        output_error: Difference of the rewritten model from the original, in eval mode; 0 means equal bits.
        train_error: The same difference in train mode, with the same seed.
        argument: Changes that the job made to the model that was passed to ``rewrite``, or "".
        judged: Number of sites that were compared with the dense oracle, each by its own gradients.
        unreached: Sites whose weight has no gradient in the original either, because the call does not run
            them or drops their result.
        passed_by: Sites whose adapter has no gradient or a wrong one, with a description.
        stray: Parameters that got a gradient and belong to no adapter.
        oracle_error: Difference of the outputs from the oracle's, at random A and B.
        gradient_error: Largest relative difference of a gradient from the oracle's.
            ``gradient_worst`` is the site with this gradient.
        tolerance: Largest allowed value of ``oracle_error`` and of ``gradient_error``.
        dtype: Dtype of the comparison.
        regions_judged: If a graph of the whole model was captured, the number of sites that were also
            compared without this graph, in a model that was rewritten without example inputs.
            ``regions_passed_by`` has the sites that are wrong, with a description.
        losses: Loss before the first step and after the last step.
        merge_error: Difference of the merged model from the adapted one. ``merge_error_fp64`` is the same in
            fp64, measured if fp32 exceeds the tolerance.
        own_class: True if the merged model has the original's classes and parameter names.
        counted: Number of weights that the counter saw.
        unseen: Counted weights that the plan does not mention.
        torch_onnx: True if ``torch.onnx.export`` exports the original.
        exported: True if ``export_onnx`` exports the merged model, with parity.
        parity: Largest relative difference between the file and PyTorch.
        fewer_fusions: The reason why the file has fewer fusions than requested.
        runtime: Files of ``optimize="runtime"`` by task; the key "" is the file without a task.
        errors: Error of each failed stage, in one line.
        dates: Day on which each part was run.
        seconds: Time of each stage.
    """

    name: str
    group: str
    note: str = ""
    stage: str = ""
    model: str = ""
    parameters: int = 0
    frontend: str = ""
    frontend_notes: list[str] = field(default_factory=list)
    found: int = 0
    adapted: int = 0
    rejected: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    output_error: float | None = None
    train_error: float | None = None
    argument: str = ""
    judged: int | None = None
    unreached: list[str] = field(default_factory=list)
    passed_by: dict[str, str] = field(default_factory=dict)
    stray: list[str] = field(default_factory=list)
    oracle_error: float | None = None
    gradient_error: float = 0.0
    gradient_worst: str = ""
    tolerance: float = 0.0
    dtype: str = ""
    regions_judged: int | None = None
    regions_passed_by: dict[str, str] = field(default_factory=dict)
    losses: tuple[float, float] | None = None
    merge_error: float | None = None
    merge_error_fp64: float | None = None
    own_class: bool | None = None
    counted: int | None = None
    unseen: list[str] = field(default_factory=list)
    torch_onnx: bool | None = None
    exported: bool | None = None
    parity: float | None = None
    fewer_fusions: str = ""
    runtime: dict[str, RuntimeFile] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    dates: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rewritten(self) -> bool:
        """Return True if the rewrite worked, changed no output, and did not change the model passed to it."""
        return self.output_error is not None and self.output_error <= 1e-6 and not self.argument

    @property
    def right(self) -> bool:
        """Return True if the rewritten model equals the dense oracle, at every site and nowhere else."""
        if (
            not self.judged
            or self.oracle_error is None
            or self.passed_by
            or self.stray
            or self.regions_passed_by
        ):
            return False
        return self.oracle_error <= self.tolerance

    @property
    def trained(self) -> bool:
        """Return True if the loss fell in twenty steps."""
        return self.losses is not None and self.losses[1] < self.losses[0]

    @property
    def merged(self) -> bool:
        """Return True if the merged model equals the adapted one and has the user's own class."""
        if self.merge_error is None or not self.own_class:
            return False
        # A deep network of random weights may amplify rounding errors. In fp64 these become small. A wrong
        # merge still differs.
        exact = self.merge_error_fp64 is not None and self.merge_error_fp64 <= 1e-9
        return self.merge_error <= MERGE_TOLERANCE or exact

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Row:
        """Return a row from the result of ``dataclasses.asdict``."""
        row = cls(**values)
        row.runtime = {
            task: RuntimeFile(**fields) for task, fields in values.get("runtime", {}).items()
        }
        return row

    def with_others_of(self, earlier: Row) -> Row:
        """Return this row with the results of an earlier row for the parts that did not run this time."""
        kept = dataclasses.replace(self if PARTS[0] in self.dates else earlier, stage="")
        for part, names in _FIELDS.items():
            for name in names:
                setattr(kept, name, getattr(self if part in self.dates else earlier, name))
        kept.errors = {**_others(earlier.errors, self.dates), **self.errors}
        kept.seconds = {**_others(earlier.seconds, self.dates), **self.seconds}
        kept.dates = {**earlier.dates, **self.dates}
        return kept

    @property
    def total_seconds(self) -> float:
        """Return the seconds that all stages of this row took together."""
        return sum(self.seconds.values())

    @property
    def job_seconds(self) -> float:
        """Return the seconds of all stages except exports with the operators of ONNX Runtime."""
        return sum(_others(self.seconds, PARTS[2:]).values())


def part_of(stage: str) -> str:
    """Return the part of a job to which a stage belongs: ``adaption``, ``export`` or ``runtime``."""
    if stage in EXPORT:
        return "export"
    return "runtime" if stage.startswith("runtime") else "adaption"


def _others(stages: Mapping[str, V], parts: Collection[str]) -> dict[str, V]:
    return {stage: value for stage, value in stages.items() if part_of(stage) not in parts}


def scrubbed(text: str) -> str:
    """Return an error's text without the paths of this machine. The text may end within a path."""
    text = re.sub(r"\s*(?:File )?\"/[^\"\s;]*(?=$|;)", "", text)  # cut before the second quote
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.])", "", text)
    return re.sub(r"\s*(?<![\w.])/\w[\w.+-]*(?=$|;)", "", text)


_PACKAGES = ("torchvision", "timm", "diffusers", "onnxruntime", "onnxruntime-gpu", "onnxscript")
_DRAWS = 1e-4  # beyond rounding


def page(rows: Sequence[Row]) -> str:
    """Return the Markdown text of the whole page."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    head, legend = text.split("\n<!-- the tables -->\n\n")
    versions = [name for name in map(version_of, _PACKAGES) if not name.endswith("not installed")]
    facts = {**machine(), "also": ", ".join(versions)}
    facts["page written"] = facts.pop("date")
    lines = [head]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    minutes = sum(row.job_seconds for row in rows) / 60
    lines += [f"- {line}" for line in _dates(rows)]
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
    if fused := runtime_table(rows):
        lines += ["", "## With the operators of ONNX Runtime", "", *fused]
    lines += ["", legend, "## What is refused, and why", ""]
    lines += _reasons(rows)
    return "\n".join(lines).rstrip() + "\n"


_SUMMED = (
    *("rewritten", "right", "trained", "merged", "judged", "unreached"),
    *("found", "adapted", "rejected", "counted", "unseen"),
)
_SUMS = """\
{rewritten} of {models} rewritten: {bits} without a changed bit, the others within 1e-6
{right} of {models} judged as right: the dense oracle's outputs, and its gradients at every site
{judged} sites judged, {unreached} without effect in the original itself, {passed} passed by
{trained} of {models} trained: the loss fell
{merged} of {models} merged: the adapted model, as the own class
{adapted} of {found} operations adapted, {rejected} refused with a reason
{counted} weights counted, {unseen} of them unseen by the plan"""


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the sums over all rows, one sentence each."""

    def total(field: str) -> int:
        values = (getattr(row, field) for row in rows)
        return sum(len(value) if isinstance(value, list | dict) else value or 0 for value in values)

    passed = total("passed_by") + total("regions_passed_by")
    bits = sum(row.output_error == 0.0 for row in rows)
    sums = {field: total(field) for field in _SUMMED}
    lines = _SUMS.format(models=len(rows), bits=bits, passed=passed, **sums).splitlines()
    tried = [row for row in rows if row.torch_onnx is not None]
    if tried:
        able = [row for row in tried if row.torch_onnx]
        both = sum(bool(row.exported) for row in able)
        only = sum(bool(row.exported) for row in tried if not row.torch_onnx)
        lines.append(
            f"{both} of {len(able)} that torch.onnx exports without adapters also export merged, "
            f"with parity; {only} of the {len(tried) - len(able)} that it does not export, too"
        )
    files = [file for row in rows for file in row.runtime.values()]
    if files:
        failed = sum(stage.startswith("runtime") for row in rows for stage in row.errors)
        fewer = sum(bool(file.fewer) for file in files)
        lines.append(
            f"{len(files)} of {len(files) + failed} files written with the operators of ONNX Runtime, with "
            f"parity; {fewer} of them with fewer fusions than were asked for"
        )
    return lines


def exceptions(rows: Sequence[Row]) -> list[str]:
    """Return a line for each problem of a row, with its cause."""
    return [
        f"{row.name}: {line}" + (f" ({row.note})" if row.note else "")
        for row in rows
        for line in _exceptions(row)
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the Markdown table for the rows of one group."""
    return markdown([*_COLUMNS], [[cell(row) for cell in _COLUMNS.values()] for row in rows])


def runtime_table(rows: Sequence[Row]) -> list[str]:
    """Return a table of the files with ONNX Runtime's operators, and a list of the fusions not applied."""
    lines = [
        [
            row.name.partition("/")[2],
            task or "as it is called",
            f"{file.parity:.0e}",
            str(file.nodes),
            _operators_of(file),
            _escaped(file.fewer) or "no",
        ]
        for row in rows
        for task, file in row.runtime.items()
    ]
    if not lines:
        return []
    columns = ["model", "file", "parity", "nodes", "operators of ONNX Runtime", "falls back"]
    text_lines = markdown(columns, lines)
    left: dict[str, list[str]] = {}
    for row in rows:
        for name, why in {
            n: w for file in row.runtime.values() for n, w in file.left.items()
        }.items():
            for reason in why.split("; "):
                key = f"{name}: {re.sub(r' [(][0-9]+×[)]$', '', reason)}"
                left.setdefault(key, []).append(row.name.partition("/")[2])
    text_lines += ["", "What was not fused, and why:", ""]
    ordered = sorted(left.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return text_lines + [f"- {_escaped(key)} ({some(names, 3)})" for key, names in ordered]


def _operators_of(file: RuntimeFile) -> str:
    counts = {
        fusion.name: file.fused[fusion.name] for fusion in FUSIONS if fusion.name in file.fused
    }
    runtime = {fusion.name for fusion in FUSIONS if fusion.level == "runtime"}
    return (
        ", ".join(f"{name} {count}×" for name, count in counts.items() if name in runtime) or "none"
    )


def _exceptions(row: Row) -> Iterator[str]:
    for stage, error in row.errors.items():
        if stage == "rewrite" and row.errors.get("plan") == error:
            continue
        if stage == "torch.onnx" or (stage == "export_onnx" and not row.torch_onnx):
            continue  # these have their own list
        yield f"{stage}: {_escaped(error)}"
    if row.argument:
        yield f"changed its argument: {row.argument}"
    if row.output_error is not None and row.output_error > 1e-6:
        yield f"outputs differ by {row.output_error:.1e}"
    for label, items in (
        ("exported with fewer fusions", [*filter(None, [_escaped(row.fewer_fusions)])]),
        ("exported for ONNX Runtime with fewer fusions", [*_fewer(row)]),
        ("a gradient where there should be none", row.stray),
        ("unseen by the plan", row.unseen),
        ("passed by", _explained(row.passed_by)),
        ("passed by without example inputs", _explained(row.regions_passed_by)),
    ):
        if items:
            yield f"{label}: {some(items, 3)}"
    if row.judged == 0:
        yield "none of its sites has an effect, so that nothing was judged"
    if row.oracle_error is not None and row.oracle_error > row.tolerance:
        yield f"outputs differ from the dense oracle's by {row.oracle_error:.1e}"
    if row.losses is not None and not row.losses[1] < row.losses[0]:
        yield f"the loss did not fall: {row.losses[0]:.3g} to {row.losses[1]:.3g}"
    if row.merge_error is not None and not row.merged:
        own = "" if row.own_class else "; not of its own class"
        yield f"merged differs by {row.merge_error:.1e}{own}"


def _fewer(row: Row) -> Iterator[str]:
    for task, file in row.runtime.items():
        if file.fewer:
            yield f"{task or 'as it is called'}: {_escaped(file.fewer)}"


def _explained(problems: Mapping[str, str]) -> list[str]:
    return [f"{name} ({how})" for name, how in problems.items()]


def _not_by_torch(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "torch.onnx" in row.errors:
            ours = "exported by export_onnx" if row.exported else row.errors.get("export_onnx", "")
            yield _escaped(f"{row.name}: {row.errors['torch.onnx']}; {ours or 'not rewritten'}")


def _dates(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each part of the jobs, with the first and the last day on which it was run."""
    titles = "all columns but those of exports", "exports", "with the operators of ONNX Runtime"
    for part, label in zip(PARTS, titles, strict=True):
        days = sorted({row.dates[part] for row in rows if part in row.dates})
        lacking = sum(part not in row.dates for row in rows)
        when = " to ".join(dict.fromkeys((*days[:1], *days[-1:]))) or "not run"
        yield f"{label}: {when}" + (f" ({lacking} models not run)" if days and lacking else "")


def _reasons(rows: Sequence[Row]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.reasons.values():
            names = by_reason.setdefault(_escaped(reason), [])
            if row.name not in names:
                names.append(row.name)
    ordered = sorted(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [f"- {reason} ({some(names, 3)})" for reason, names in ordered] or ["Nothing."]


def _difference(value: float | None) -> str:
    if value is None:
        return ""
    return "same bits" if value == 0.0 else f"{value:.0e}"


def _yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _escaped(text: str) -> str:
    """Escape an error for a cell of a Markdown table, and remove paths.

    A text such as ``[1](x)`` must not become a link.
    """
    return re.sub(r"([\[\]*`|])", r"\\\1", scrubbed(text)).replace("<", "&lt;")


def _of_train_mode(row: Row) -> str:
    error = row.train_error
    return "other draws" if error is not None and error > _DRAWS else _difference(error)


def _of_merge(row: Row) -> str:
    error, exact = row.merge_error, row.merge_error_fp64
    return ("" if error is None else f"{error:.0e}") + (
        "" if exact is None else f" (fp64 {exact:.0e})"
    )


def _of_export(row: Row) -> str:
    return f"{row.parity:.0e}" if row.exported and row.parity is not None else _yes_no(row.exported)


def _if_judged(count: Callable[[Row], int | None]) -> Callable[[Row], str]:
    return lambda row: "" if row.judged is None else str(count(row))


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: row.name.partition("/")[2],
    "front-end": lambda row: row.frontend or "none",
    "found": lambda row: str(row.found),
    "adapted": lambda row: str(row.adapted),
    "refused": lambda row: str(row.rejected),
    "outputs": lambda row: _difference(row.output_error),
    "train mode": _of_train_mode,
    "judged": _if_judged(lambda row: row.judged),
    "unreached": _if_judged(lambda row: len(row.unreached)),
    "passed by": _if_judged(lambda row: len(row.passed_by) + len(row.regions_passed_by)),
    "loss": lambda row: "" if row.losses is None else "{:.2f} to {:.2f}".format(*row.losses),
    "merge": _of_merge,
    "torch.onnx": lambda row: _yes_no(row.torch_onnx),
    "export": _of_export,
    "unseen": lambda row: "" if row.counted is None else f"{len(row.unseen)} of {row.counted}",
    "seconds": lambda row: f"{row.job_seconds:.0f}",
}
