"""How far apart two outputs are, and whether one of them has overflowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ParityError
from lora_fx.export.report import OutputParity

__all__ = ["TOLERANCES", "Outputs", "PrecisionError", "difference", "overflows"]

Outputs: TypeAlias = list[tuple[str, Tensor]]

# Over the largest magnitude of the output. Half precision: twenty roundings to 11 and to 8 digits
# (2⁻¹¹ and 2⁻⁸), what a deep network adds up when each operation rounds once. Single precision has
# room to spare (2⁻²⁴): there, the order of a long sum decides.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Below it an output is taken for zero and the difference is compared with this instead.
_SMALLEST_SCALE = 1e-3


class PrecisionError(ParityError):
    """The model itself is not what it was in the precision that it is to be exported in."""


def difference(
    name: str, want: Tensor, got: Tensor, masks: Sequence[Tensor], precision: torch.dtype
) -> OutputParity:
    """Compare an output of the file with the reference.

    Args:
        name: Of the output.
        want: The reference.
        got: What the file gave, of the same shape.
        masks: Attention masks, [batch, sequence]: positions that they do not admit count as equal.
        precision: The coarsest dtype in which the file computes.

    Returns:
        The differences, with the tolerance of ``precision``; 0 for what is no floating number.
    """
    tolerance = TOLERANCES[precision] if want.is_floating_point() else 0.0
    left, right = want.detach().double(), _admitted(want, got, masks).double()
    if got.is_floating_point():
        # The lowest number of a dtype, with which masks are filled, is not that of another one.
        limit = torch.finfo(got.dtype).max
        left = torch.where(left.isfinite(), left.clamp(-limit, limit), left)
    same = (left == right) | (left.isnan() & right.isnan())
    if bool(same.all()):
        return OutputParity(name, 0.0, 0.0, tolerance)
    apart = torch.where(same, 0.0, (left - right).abs())
    # inf or nan on one side only is no number to compare: it is wrong.
    error = float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    finite = torch.where(left.isfinite(), left.abs(), 0.0)
    scale = max(float(finite.max()), _SMALLEST_SCALE)
    return OutputParity(name, error, error / scale, tolerance)


def overflows(want: Tensor, got: Tensor, masks: Sequence[Tensor]) -> bool:
    """Whether ``got`` is inf or nan at an admitted position where ``want`` is a finite number."""
    if not got.is_floating_point():
        return False
    return bool((want.isfinite() & ~_admitted(want, got, masks).isfinite()).any())


def _admitted(want: Tensor, got: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """``got`` with ``want`` in the positions that a mask leaves out."""
    for mask in masks:
        if want.shape[:2] == mask.shape:
            outside = (mask == 0).reshape(*mask.shape, *[1] * (want.ndim - 2))
            got = torch.where(outside, want.to(got.dtype), got)
    return got
