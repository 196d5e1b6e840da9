"""Bounds of what a merge can give, from the factors alone: no weight is read for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lora_fx.ir.values import PlannedSite
from lora_fx.passes.parameters.factors import factors_of
from lora_fx.passes.patterns.registry import (
    ConvPattern,
    ConvTransposePattern,
    EinsumPattern,
    EmbeddingPattern,
    ExpertsPattern,
    LinearPattern,
    pattern_of,
)

__all__ = ["cannot_overflow"]

# Whose ΔW has elements that are each a sum over the rank; a user's own may be anything.
_SUMS_OVER_RANK = (
    ConvPattern.delta,
    ConvTransposePattern.delta,
    EinsumPattern.delta,
    EmbeddingPattern.delta,
    ExpertsPattern.delta,
    LinearPattern.delta,
)


def cannot_overflow(
    model: nn.Module, rows: Sequence[tuple[PlannedSite, str]], dtype: torch.dtype
) -> bool:
    """Whether a weight that is finite stays so, whatever it holds; False if that is not known.

    ``|s (BA)_ij| ≤ |s| · r · max|A| · max|B|``, and less than half a unit in the last place of the largest
    number of a dtype rounds away when it is added to that number. With DoRA no element is above the
    magnitude of its row: ``|W + s·BA|_ij ≤ ‖W + s·BA‖_i``.

    Args:
        model: The rewritten model.
        rows: Sites of one weight, each with the name of its adapter.
        dtype: Of the merged weight.
    """
    largest, change = torch.finfo(dtype), 0.0
    for row, adapter in rows:
        if type(pattern_of(row.site)).delta not in _SUMS_OVER_RANK:
            return False
        factors = factors_of(model, row, adapter)
        change += abs(row.scale) * row.rank * _largest(factors.a) * _largest(factors.b)
        m = factors.magnitude
        # What DoRA makes of a weight has that bound only if nothing else is added to it.
        if m is not None and (len(rows) > 1 or _largest(m) > largest.max / 2):
            return False
    # Half a unit is max · eps / 4; the rest is for the rounding of what is computed here.
    return change < largest.max * largest.eps / 8


def _largest(values: torch.Tensor) -> float:
    return max((abs(float(end)) for end in torch.aminmax(values.detach())), default=0.0)
