"""What a merge did, and how exactly: every merged element against fp64."""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_fx.passes._rounding import ulp

__all__ = ["MergeReport", "MergedSite", "compared"]


@dataclasses.dataclass(frozen=True, slots=True)
class MergedSite:
    """One folded weight.

    Attributes:
        name: FQN of the site.
        adapters: What was folded in.
        max_ulp: Largest error of a merged element against fp64, in units in the last place of the
            weight's dtype; a correctly rounded weight has at most 0.5. NaN if it was not measured.
        relative_change: ``‖ΔW‖ / ‖W‖``; NaN if it was not measured.
    """

    name: str
    adapters: tuple[str, ...]
    max_ulp: float
    relative_change: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        sites: One row a weight.
        untied: FQNs that shared their storage with another parameter and do not any more.
    """

    sites: tuple[MergedSite, ...]
    untied: tuple[str, ...] = ()

    @property
    def max_ulp(self) -> float:
        """The largest error of all."""
        return max((site.max_ulp for site in self.sites), default=0.0)

    def __str__(self) -> str:
        count, worst = len(self.sites), self.max_ulp
        lines = [f"{count} weight(s) merged, largest error {worst:.4f} units in the last place"]
        lines += [
            f"  {s.name}: {s.max_ulp:.4f} ulp, changed by {s.relative_change:.2e}"
            for s in self.sites
        ]
        lines += [f"  untied: {name}" for name in self.untied]
        return "\n".join(lines)


def compared(
    name: str,
    adapters: tuple[str, ...],
    old: torch.Tensor,
    merged: torch.Tensor,
    exact: torch.Tensor | None,
) -> MergedSite:
    """The row of one weight.

    Args:
        name: FQN of the site.
        adapters: What was folded in.
        old: The weight before.
        merged: The weight after.
        exact: What it would be in fp64; None if that is not measured.
    """
    if exact is None:
        return MergedSite(name, adapters, math.nan, math.nan)
    error = (merged.double() - exact).abs() / ulp(exact, merged.dtype)
    tiny = torch.finfo(torch.float64).tiny
    change = float((exact - old.double()).norm() / old.double().norm().clamp_min(tiny))
    return MergedSite(name, adapters, float(error.max()), change)
