"""The one way in which tests compare numbers: against fp64, relatively, or by bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = [
    "TORCH",
    "assert_close",
    "assert_same_bits",
    "in_double",
    "relative_error",
    "tensors",
    "ulp",
    "ulp_error",
]

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
"""The release of PyTorch, as (2, 15)."""

# What one rounding of the result, and a few of what it was summed from, may leave.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def in_double(model: nn.Module) -> nn.Module:
    """A copy in fp64: the reference for whatever runs in less."""
    return copy.deepcopy(model).double()


def tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors in an output of any structure."""
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def relative_error(found: Any, exact: Any) -> float:
    """Largest difference of any pair of tensors, relative to the largest value of the exact one."""
    left, right = tensors(found), tensors(exact)
    assert len(left) == len(right) > 0, f"{len(left)} tensors against {len(right)}"
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
        assert torch.isfinite(a).all(), "not finite"
        a, b = a.detach().double(), b.detach().double()
        scale = b.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float((a - b).abs().max() / scale)) if a.numel() else worst
    return worst


def assert_close(found: Any, exact: Any, tolerance: float | None = None) -> None:
    """The relative error is within the tolerance, by default that of the dtype that was found."""
    if tolerance is None:
        tolerance = max(TOLERANCE[tensor.dtype] for tensor in tensors(found))
    error = relative_error(found, exact)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def assert_same_bits(found: Any, reference: Any) -> None:
    """Every tensor is the same to the last bit; NaN is equal to NaN."""
    left, right = pytree.tree_leaves(found), pytree.tree_leaves(reference)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor):
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        assert bool(same.all()), (
            f"relative error {relative_error(a, b):.3g}, expected no changed bit"
        )


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbors of `dtype` around fp64 values: 2^(exponent - mantissa bits).

    Written differently from lora_fx's own on purpose.
    """
    info = torch.finfo(dtype)
    magnitude = values.double().abs().clamp_min(info.tiny)
    return 2.0 ** torch.floor(torch.log2(magnitude)) * info.eps


def ulp_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units in the last place of the dtype that was found; rounding leaves 0.5."""
    assert exact.dtype == torch.float64
    return float(((found.detach().double() - exact).abs() / ulp(exact, found.dtype)).max())
