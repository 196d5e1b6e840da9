"""The contract of a pass: from a capture to a capture, and what it changed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

from lora_fx.ir.graph import Capture

__all__ = [
    "Pass",
    "PassResult",
]


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns.

    Attributes:
        capture: The result; the argument itself if nothing was modified.
        modified: Whether anything was, true to fact.
    """

    capture: Capture
    modified: bool


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options; calling it runs it.

    It never edits the graphs of its input. The model of the capture is the pipeline's own: passes
    add to it.
    """

    name: ClassVar[str]

    def __call__(self, capture: Capture) -> PassResult:
        """Runs the pass."""
