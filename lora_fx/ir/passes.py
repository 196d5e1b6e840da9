"""The contract of a pass: from a capture to a capture, and what it changed."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

from lora_fx.ir.graph import Capture

__all__ = ["Kind", "Pass", "PassResult"]

Kind: TypeAlias = Literal["functional", "in place"]


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns.

    Attributes:
        capture: The result; the argument itself if nothing was modified.
        modified: Whether anything was, true to fact.
    """

    capture: Capture
    modified: bool

    @classmethod
    def of(cls, capture: Capture, **fields: Any) -> PassResult:
        """The capture with other values of some fields; the capture itself where it has them already."""
        if all(getattr(capture, name) == value for name, value in fields.items()):
            return cls(capture, False)
        return cls(dataclasses.replace(capture, **fields), True)


class Pass(abc.ABC):
    """A frozen dataclass whose fields are its options; calling it runs it.

    A functional pass returns a new capture and leaves its argument as it is. A pass that works in place edits
    the model of the capture, which is the pipeline's own copy, and returns its argument. Running a pass a
    second time modifies nothing. :func:`lora_fx.passes.pipeline.run_passes` enforces all of it.

    Attributes:
        name: Its name in errors, logs and on the command line, in kebab case.
        kind: Whether it is functional or works in place.
        needs: What the capture has to have, ``matches`` or ``plan``, unless the pass is given its own
            (``plan``, ``rows``); empty for nothing.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "functional"
    needs: ClassVar[str] = ""

    def requires(self, capture: Capture) -> str | None:
        """Say what the capture lacks for the pass to run; None if it lacks nothing. It has to be cheap."""
        given = any(getattr(self, option, None) is not None for option in ("plan", "rows"))
        if not self.needs or given or getattr(capture, self.needs) is not None:
            return None
        return "nothing is planned" if self.needs == "plan" else "no operations were looked for"

    def ensures(self, before: Capture, after: Capture) -> str | None:
        """Say what is wrong with the result; None if nothing is. It has to be cheap."""
        return None

    @abc.abstractmethod
    def __call__(self, capture: Capture) -> PassResult:
        """Run the pass."""
