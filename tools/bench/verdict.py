"""How a goal stands."""

from __future__ import annotations

import dataclasses

__all__ = ["Verdict"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a goal stands.

    Attributes:
        measured: The figures.
        excess: What is measured less what is allowed, in the goal's unit: met if it is not positive.
        unit: Of the excess.
    """

    measured: str
    excess: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.excess <= 0

    def __str__(self) -> str:
        return "yes" if self.met else f"no, by {self.excess:.2g}{self.unit}"
