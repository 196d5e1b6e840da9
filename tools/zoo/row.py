"""What one model came to: plain data that crosses from the process of the job to the report."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["GRADIENT_TOLERANCE", "MERGE_TOLERANCE", "STAGES", "Row"]

STAGES = (
    "build",
    "plan",
    "rewrite",
    "outputs",
    "gradients",
    "training",
    "merge",
    "counter",
    "torch.onnx",
    "export_onnx",
)
"""The parts of the job, in order."""

MERGE_TOLERANCE = 1e-5
"""What a merged model may differ by in fp32, relative to the largest output."""

GRADIENT_TOLERANCE = 1e-2
"""What a gradient may differ by from the chain rule's: fp32, on random weights."""


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
        stray: Parameters that got a gradient and are no adapter's.
        missing: Adapted weights whose factors have no gradient, though the original's weight has.
        unreached: Adapted weights that have none in the original either: this call does not come to
            them, or drops what they compute.
        infinite: Factors whose gradient is not finite.
        gradient_error: Largest difference between the gradient of a B and what the chain rule
            makes of the original's gradient, relative to it; ``gradient_worst`` is whose.
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
    stray: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    infinite: list[str] = field(default_factory=list)
    gradient_error: float = 0.0
    gradient_worst: str = ""
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
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rewritten(self) -> bool:
        """Whether the rewrite worked, changed no output and left its argument alone."""
        return self.output_error is not None and self.output_error <= 1e-6 and not self.argument

    @property
    def trained(self) -> bool:
        """Whether every adapter, and nothing else, was trained, and the loss fell."""
        if self.losses is None or self.stray or self.missing or self.infinite:
            return False
        if self.gradient_error > GRADIENT_TOLERANCE:
            return False
        return self.losses[1] < self.losses[0]

    @property
    def merged(self) -> bool:
        """Whether the merged model is the adapted one, as the user's own class."""
        if self.merge_error is None or not self.own_class:
            return False
        # A deep network of random weights may amplify roundings; fp64 tells that from a mistake.
        exact = self.merge_error_fp64 is not None and self.merge_error_fp64 <= 1e-9
        return self.merge_error <= MERGE_TOLERANCE or exact

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the whole job."""
        return sum(self.seconds.values())
