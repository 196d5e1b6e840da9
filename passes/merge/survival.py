"""Measure how much of a change survives rounding: of its size, of its entries, and of its effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from lora_fx.ir import PlannedSite
from lora_fx.passes.merge.compensated import matrix_of
from lora_fx.passes.merge.rounding import ulp

__all__ = ["Slice", "Survival", "measure_survival"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some output features of a weight: their values before a merge, and the exact sums.

    Attributes:
        axis, start: Axis of the output features, and index of the first one, in ``Site.applied(weight)``.
        before: Values before the merge, in fp64 (in fp32 if the device has no fp64).
        exact: The exact sums, in the same dtype and shape.
    """

    axis: int
    start: int
    before: torch.Tensor
    exact: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Survival:
    """The part of a change that is left in a merged weight.

    Attributes:
        change: ``‖ΔW‖``, estimated from the measured entries.
        relative_change: ``‖ΔW‖ / ‖W‖``.
        kept: ``⟨Ŵ - W, ΔW⟩ / ‖ΔW‖²`` with the stored weight Ŵ; NaN without a change.
        moved: The share of the entries that changed.
        output_error: ``‖(Ŵ - W - ΔW) x‖ / ‖ΔW x‖`` over the inputs; NaN if they are unknown.
        max_ulp: The largest error against the exact sum, in units in the last place; NaN if not measured.
    """

    change: float = math.nan
    relative_change: float = math.nan
    kept: float = math.nan
    moved: float = math.nan
    output_error: float = math.nan
    max_ulp: float = math.nan


def measure_survival(
    slices: Iterable[Slice],
    merged: torch.Tensor,
    rows: tuple[PlannedSite, ...],
    moments: Mapping[str, torch.Tensor],
    *,
    ulps: bool = False,
) -> Survival:
    """Measure how much of a change is left in a merged weight, compared with the exact sum.

    Args:
        slices: The slices of the weight to measure.
        merged: The stored values of the merged weight, in its own shape.
        rows: The planned sites of the weight.
        moments: Second moments of the inputs of sites, by their names, [in, in].
        ulps: True to measure the largest error, too.
    """
    site = rows[0].site
    applied, dtype = site.applied(merged), merged.dtype
    size, old, along = 0.0, 0.0, 0.0
    moved, count, largest = 0, 0, 0.0
    outputs = [0.0, 0.0]
    for part in slices:
        after = applied.narrow(part.axis, part.start, part.exact.shape[part.axis])
        wanted, reached = part.exact - part.before, after.to(part.before) - part.before
        size += float(wanted.square().sum())
        old += float(part.before.square().sum())
        along += float((wanted * reached).sum())
        moved += int((after != part.before.to(dtype)).sum())
        count += after.numel()
        if ulps:
            error = (after.to(part.exact) - part.exact).abs() / ulp(part.exact, dtype)
            largest = max(largest, float(error.max()))
        if moments:
            outputs[0] += _energy(wanted, part, rows, moments)
            outputs[1] += _energy(reached - wanted, part, rows, moments)
    if not count:
        return Survival()
    return Survival(
        change=math.sqrt(size * merged.numel() / count),
        relative_change=math.sqrt(size / old) if old else math.nan,
        kept=along / size if size else math.nan,
        moved=moved / count,
        output_error=math.sqrt(outputs[1] / outputs[0]) if outputs[0] else math.nan,
        max_ulp=largest if ulps else math.nan,
    )


def _energy(
    change: torch.Tensor,
    part: Slice,
    rows: tuple[PlannedSite, ...],
    moments: Mapping[str, torch.Tensor],
) -> float:
    """Return ``tr(D H Dᵀ)`` for a part of a change D: the mean square of its effect on the outputs.

    Sites without known moments H are left out.
    """
    matrix = matrix_of(rows[0].site, change)
    if matrix is None:
        return 0.0
    total = 0.0
    for site in {row.site.rows: row.site for row in rows}.values():
        first, last = site.rows or (0, part.start + len(matrix))
        low, high = max(first - part.start, 0), min(last - part.start, len(matrix))
        if site.name in moments and low < high:
            within = matrix[low:high].to(moments[site.name])
            total += float(((within @ moments[site.name]) * within).sum())
    return total
