"""Rows of the zoo as a page of Markdown: the sums, every exception with its cause, the tables."""

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
"""What a merged model may differ by in fp32, relative to the largest output."""

EXPORT = ("torch.onnx", "export_onnx")
"""The stages that ``--no-onnx`` leaves out: they take most of the time."""

PARTS = ("adaption", "export", "runtime")
"""What a row has a date of: all other stages; those; exports with the operators of ONNX Runtime."""

_FIELDS = {
    "export": ("torch_onnx", "exported", "parity", "fewer_fusions"),
    "runtime": ("runtime",),
}
"""What of a row each part but the first has made."""

V = TypeVar("V")


@dataclass
class RuntimeFile:
    """A file with the operators of ONNX Runtime.

    Attributes:
        parity: The largest relative difference between the file and PyTorch.
        nodes: How many it has.
        fused: Name of a fusion to how often it was applied.
        left: Name of a fusion, or of a level of them, to why it was not.
        fewer: Why the file has fewer fusions than were asked for.
    """

    parity: float
    nodes: int
    fused: dict[str, int]
    left: dict[str, str]
    fewer: str = ""


@dataclass
class Row:
    """One model's results; what a stage that failed would have said keeps its default.

    Attributes:
        name, group, note: Those of the entry.
        stage: The stage that began last: where it happened, if the process was lost.
        model: Class of the model.
        parameters: Elements of the model's parameters.
        frontend: The front-end that captured it, and ``frontend_notes`` why no other one did.
        found, adapted, rejected: Linear operations.
        reasons: For each rejected one its name and the reason.
        output_error: Of the rewritten model against the original, in eval mode; 0 means equal bits.
        train_error: Likewise in train mode, with the same seed.
        argument: What the job changed in the argument of ``rewrite``; empty if nothing.
        judged: Sites that were compared with the dense oracle, each by its own gradients.
        unreached: Sites whose weight has no gradient in the original either: this call does not come to
            them, or drops what they compute.
        passed_by: Sites whose adapter has no gradient or another one than the oracle's, with what is
            wrong.
        stray: Parameters that got a gradient and are no adapter's.
        oracle_error: Of the outputs against the oracle's, at random A and B.
        gradient_error: Largest difference of a gradient from the oracle's, relative to it;
            ``gradient_worst`` is whose.
        tolerance: What both may be.
        dtype: In which it was looked at.
        regions_judged: Where a graph of the whole model was captured, how many sites were compared without
            it, too: rewritten without example inputs, as all calls of another form run.
            ``regions_passed_by`` is which of them are wrong, and how.
        losses: Before the first step and after the last.
        merge_error: Of the merged model against the adapted one; ``merge_error_fp64`` the same in
            fp64, measured where fp32 exceeds the tolerance.
        own_class: Whether the merged model is of the original classes, with its parameter names.
        counted: Weights that the counter saw.
        unseen: Those that the plan does not mention.
        torch_onnx: Whether ``torch.onnx.export`` exports the original.
        exported: Whether ``export_onnx`` exports the merged model, with parity.
        parity: The largest relative difference between the file and PyTorch.
        fewer_fusions: Why the file has fewer fusions than were asked for.
        runtime: Task to the file that ``optimize="runtime"`` gives; "" is a call as the model is called.
        errors: Stage to what it raised, in one line.
        dates: ``adaption`` and ``export`` to the day on which that part was run.
        seconds: Stage to its time.
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
        """Whether the rewrite worked, changed no output and left its argument alone."""
        return self.output_error is not None and self.output_error <= 1e-6 and not self.argument

    @property
    def right(self) -> bool:
        """Whether the rewritten model is the dense oracle, at every site and nowhere else."""
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
        """Whether the loss fell in twenty steps."""
        return self.losses is not None and self.losses[1] < self.losses[0]

    @property
    def merged(self) -> bool:
        """Whether the merged model is the adapted one, as the user's own class."""
        if self.merge_error is None or not self.own_class:
            return False
        # A deep network of random weights may amplify roundings; fp64 tells that from a mistake.
        exact = self.merge_error_fp64 is not None and self.merge_error_fp64 <= 1e-9
        return self.merge_error <= MERGE_TOLERANCE or exact

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Row:
        """A row from what ``dataclasses.asdict`` gives of it."""
        row = cls(**values)
        row.runtime = {task: RuntimeFile(**one) for task, one in values.get("runtime", {}).items()}
        return row

    def with_others_of(self, earlier: Row) -> Row:
        """This row with what an earlier one knows of the parts that were not run again."""
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
        """Wall-clock seconds of all that was run."""
        return sum(self.seconds.values())

    @property
    def job_seconds(self) -> float:
        """Those without the exports with operators of ONNX Runtime."""
        return sum(_others(self.seconds, PARTS[2:]).values())


def part_of(stage: str) -> str:
    """The part that a stage belongs to."""
    if stage in EXPORT:
        return "export"
    return "runtime" if stage.startswith("runtime") else "adaption"


def _others(stages: Mapping[str, V], parts: Collection[str]) -> dict[str, V]:
    return {stage: value for stage, value in stages.items() if part_of(stage) not in parts}


def scrubbed(text: str) -> str:
    """A text without the folders of the machine; it may end, or be cut, within a path."""
    text = re.sub(r"\s*(?:File )?\"/[^\"\s;]*(?=$|;)", "", text)  # without its second quote: cut
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.])", "", text)
    return re.sub(r"\s*(?<![\w.])/\w[\w.+-]*(?=$|;)", "", text)


_PACKAGES = ("torchvision", "timm", "diffusers", "onnxruntime", "onnxruntime-gpu", "onnxscript")
_DRAWS = 1e-4  # beyond rounding


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    head, legend = text.split("\n<!-- the tables -->\n\n")
    found = [one for one in map(version_of, _PACKAGES) if not one.endswith("not installed")]
    facts = {**machine(), "also": ", ".join(found)}
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
    """The sums, one sentence each."""

    def total(field: str) -> int:
        values = (getattr(row, field) for row in rows)
        return sum(len(one) if isinstance(one, list | dict) else one or 0 for one in values)

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
    """Everything that is not as it should be, with its cause in one line."""
    return [
        f"{row.name}: {line}" + (f" ({row.note})" if row.note else "")
        for row in rows
        for line in _exceptions(row)
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """One group's table."""
    return markdown([*_COLUMNS], [[cell(row) for cell in _COLUMNS.values()] for row in rows])


def runtime_table(rows: Sequence[Row]) -> list[str]:
    """The files with the operators of ONNX Runtime, a line each, and what was not fused."""
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
    made = markdown(columns, lines)
    left: dict[str, list[str]] = {}
    for row in rows:
        for name, why in {
            n: w for file in row.runtime.values() for n, w in file.left.items()
        }.items():
            for reason in why.split("; "):
                key = f"{name}: {re.sub(r' [(][0-9]+×[)]$', '', reason)}"
                left.setdefault(key, []).append(row.name.partition("/")[2])
    made += ["", "What was not fused, and why:", ""]
    ordered = sorted(left.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return made + [f"- {_escaped(key)} ({some(names, 3)})" for key, names in ordered]


def _operators_of(file: RuntimeFile) -> str:
    found = {one.name: file.fused[one.name] for one in FUSIONS if one.name in file.fused}
    runtime = {one.name for one in FUSIONS if one.level == "runtime"}
    return (
        ", ".join(f"{name} {count}×" for name, count in found.items() if name in runtime) or "none"
    )


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
    for what, found in (
        ("exported with fewer fusions", [*filter(None, [_escaped(row.fewer_fusions)])]),
        ("exported for ONNX Runtime with fewer fusions", [*_fewer(row)]),
        ("a gradient where there should be none", row.stray),
        ("unseen by the plan", row.unseen),
        ("passed by", _explained(row.passed_by)),
        ("passed by without example inputs", _explained(row.regions_passed_by)),
    ):
        if found:
            yield f"{what}: {some(found, 3)}"
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


def _explained(found: Mapping[str, str]) -> list[str]:
    return [f"{name} ({how})" for name, how in found.items()]


def _not_by_torch(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "torch.onnx" in row.errors:
            ours = "exported by export_onnx" if row.exported else row.errors.get("export_onnx", "")
            yield _escaped(f"{row.name}: {row.errors['torch.onnx']}; {ours or 'not rewritten'}")


def _dates(rows: Sequence[Row]) -> Iterator[str]:
    """When each part of the rows was run: they may be of different days."""
    titles = "all columns but those of exports", "exports", "with the operators of ONNX Runtime"
    for part, what in zip(PARTS, titles, strict=True):
        days = sorted({row.dates[part] for row in rows if part in row.dates})
        lacking = sum(part not in row.dates for row in rows)
        when = " to ".join(dict.fromkeys((*days[:1], *days[-1:]))) or "not run"
        yield f"{what}: {when}" + (f" ({lacking} models not run)" if days and lacking else "")


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
    """An error for a table, without the folders of the machine."""
    return scrubbed(text).replace("|", "\\|").replace("<", "&lt;")


def _of_train_mode(row: Row) -> str:
    error = row.train_error
    return "other draws" if error is not None and error > _DRAWS else _difference(error)


def _of_merge(row: Row) -> str:
    found, exact = row.merge_error, row.merge_error_fp64
    return ("" if found is None else f"{found:.0e}") + (
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
