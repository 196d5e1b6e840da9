"""What one model came to: plain data that crosses from the process of the job to the report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["EXPORT", "MERGE_TOLERANCE", "PARTS", "STAGES", "Row", "scrubbed"]

STAGES = (
    "build",
    "plan",
    "rewrite",
    "outputs",
    "oracle",
    "regions",
    "training",
    "merge",
    "counter",
    "torch.onnx",
    "export_onnx",
)
"""The parts of the job, in order."""

MERGE_TOLERANCE = 1e-5
"""What a merged model may differ by in fp32, relative to the largest output."""

EXPORT = ("torch.onnx", "export_onnx")
"""The stages that ``--no-onnx`` leaves out: they take most of the time."""

PARTS = ("adaption", "export")
"""What a row has a date of: all stages but those, and those."""

_EXPORT = ("torch_onnx", "exported", "parity")

V = TypeVar("V")


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
        output_error: Of the rewritten model beside the original, in eval mode; 0 is no changed bit.
        train_error: Likewise in train mode, with the same seed.
        argument: What the job changed in the argument of ``rewrite``: nothing, if all is well.
        judged: Sites that were compared with the dense oracle, each by its own gradients.
        unreached: Sites whose weight has no gradient in the original either: this call does not come to
            them, or drops what they compute.
        passed_by: Sites whose adapter has no gradient or another one than the oracle's, with what is
            wrong.
        stray: Parameters that got a gradient and are no adapter's.
        oracle_error: Of the outputs beside the oracle's, at random A and B.
        gradient_error: Largest difference of a gradient from the oracle's, relative to it;
            ``gradient_worst`` is whose.
        tolerance: What both may be.
        dtype: In which it was looked at.
        regions_judged: Where a graph of the whole model was captured, how many sites were compared without
            it, too: rewritten without example inputs, as all calls of another form run.
            ``regions_passed_by`` is which of them are wrong, and how.
        losses: Before the first step and after the last.
        merge_error: Of the merged model beside the adapted one; ``merge_error_fp64`` the same in
            fp64, measured where fp32 exceeds the tolerance.
        own_class: Whether the merged model is of the original classes, with its parameter names.
        counted: Weights that the counter saw.
        unseen: Those that the plan does not mention.
        torch_onnx: Whether ``torch.onnx.export`` exports the original.
        exported: Whether ``export_onnx`` exports the merged model, with parity.
        parity: The largest relative difference between the file and PyTorch.
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

    def with_export_of(self, earlier: Row) -> Row:
        """This row with what an earlier one knows of exports: no part of it was run again."""
        kept = dataclasses.replace(self, **{name: getattr(earlier, name) for name in _EXPORT})
        kept.errors = {**self.errors, **_of_export(earlier.errors)}
        kept.seconds = {**self.seconds, **_of_export(earlier.seconds)}
        kept.dates = {**self.dates, **{k: v for k, v in earlier.dates.items() if k == "export"}}
        return kept

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the whole job."""
        return sum(self.seconds.values())


def _of_export(stages: Mapping[str, V]) -> dict[str, V]:
    return {stage: value for stage, value in stages.items() if stage in EXPORT}


def scrubbed(text: str) -> str:
    """A text without the folders of the machine; it may end, or be cut, within a path."""
    text = re.sub(r"\s*(?:File )?\"/[^\"\s;]*(?=$|;)", "", text)  # without its second quote: cut
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.])", "", text)
    return re.sub(r"\s*(?<![\w.])/\w[\w.+-]*(?=$|;)", "", text)
