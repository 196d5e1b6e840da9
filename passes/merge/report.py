"""What a merge did, and how exactly: every merged element against fp64."""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_fx.passes.merge.rounding import ulp

__all__ = ["MergeReport", "MergedSite", "OutputError", "compared"]


@dataclasses.dataclass(frozen=True, slots=True)
class MergedSite:
    """One folded weight.

    Attributes:
        name: FQN of the site.
        adapters: What was folded in.
        max_ulp: Largest error of a merged element against fp64, in units in the last place of the
            weight's dtype; a correctly rounded weight has at most 0.5. NaN if it was not measured.
        relative_change: ``‖ΔW‖ / ‖W‖``; NaN if it was not measured.
        requantization_error: ``‖Q(W') - W'‖ / ‖W'‖`` for a weight that was quantized again, with W' the exact
            merged weight; NaN for any other. Where it is not below ``relative_change``, what the adapter
            has learned is lost in it.
    """

    name: str
    adapters: tuple[str, ...]
    max_ulp: float
    relative_change: float
    requantization_error: float = math.nan

    @property
    def requantized(self) -> bool:
        """Whether it was quantized again."""
        return not math.isnan(self.requantization_error)


@dataclasses.dataclass(frozen=True, slots=True)
class OutputError:
    """What quantizing again does to the outputs, on example inputs; in evaluation, over all floating outputs.

    Attributes:
        relative_error: ``‖y_q - y‖ / ‖y‖``, with y of the adapted model and y_q of the merged one.
        largest: ``max |y_q - y|``.
        relative_change: ``‖y - y_0‖ / ‖y‖``, with y_0 of the base: what the adapters do.
    """

    relative_error: float
    largest: float
    relative_change: float

    def __str__(self) -> str:
        return (
            f"outputs: off by {self.relative_error:.2e} of their norm after quantizing again (a single value "
            f"by at most {self.largest:.2e}), where the adapters change them by {self.relative_change:.2e}"
        )


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        sites: One row a weight.
        untied: FQNs that shared their storage with another parameter and do not any more.
        outputs: What quantizing again does to the outputs; None if that was not measured.
        shared: FQNs of the parameters that are shared with the model that was rewritten, and frozen.
    """

    sites: tuple[MergedSite, ...]
    untied: tuple[str, ...] = ()
    outputs: OutputError | None = None
    shared: tuple[str, ...] = ()

    @property
    def max_ulp(self) -> float:
        """The largest error of all that were rounded to a dtype."""
        return max((site.max_ulp for site in self.sites if not site.requantized), default=0.0)

    @property
    def requantization_error(self) -> float:
        """The largest of all that were quantized again; NaN if none was."""
        errors = [site.requantization_error for site in self.sites if site.requantized]
        return max(errors, default=math.nan)

    def __str__(self) -> str:
        again = [site for site in self.sites if site.requantized]
        said = [f"{len(self.sites)} weight(s) merged"]
        if len(again) < len(self.sites) or not again:
            said.append(f"largest error {self.max_ulp:.4f} units in the last place")
        if again:
            worst = self.requantization_error
            said.append(f"{len(again)} quantized again, largest error {worst:.2e} of the weight")
        lines = [", ".join(said)]
        lines += [] if self.outputs is None else [str(self.outputs)]
        lines += [_line(site) for site in self.sites]
        lines += [f"  untied: {name}" for name in self.untied]
        if self.shared:
            lines.append(
                f"{len(self.shared)} parameter(s) shared with the base, and frozen: own=True copies them"
            )
        return "\n".join(lines)


def _line(site: MergedSite) -> str:
    error = f"{site.max_ulp:.4f} ulp"
    if site.requantized:
        error = f"{site.requantization_error:.2e} lost by quantizing again"
    return f"  {site.name}: {error}, changed by {site.relative_change:.2e}"


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
