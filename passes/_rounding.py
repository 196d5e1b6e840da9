"""Rounding once, and measuring how well."""

from __future__ import annotations

import torch

__all__ = ["rounded", "ulp"]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds once. PyTorch casts fp64 to a half type by way of fp32, which would round twice.

    Rounding to odd on the way makes the second rounding the only one that counts (Boldo and
    Melquiond, "When double rounding is odd", 2005).
    """
    if values.dtype != torch.float64 or dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    near = values.float()
    gap = values - near.double()
    even = (near.view(torch.int32) & 1) == 0
    other = torch.nextafter(near, torch.where(gap > 0, torch.inf, -torch.inf).float())
    return torch.where(even & (gap != 0) & near.isfinite(), other, near).to(dtype)


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of ``dtype`` around each fp64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    size = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    return size.clamp_min(info.smallest_normal * info.eps)
