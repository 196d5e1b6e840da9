"""Rounding once, and measuring how well."""

from __future__ import annotations

import torch

__all__ = ["rounded", "ulp"]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds once. PyTorch casts fp64 to a half type by way of fp32, which would round twice.

    A value lies between the two neighbours of what it is in fp32. Where both round to the same number,
    so does the value; the few others are close to half-way between two numbers, and are rounded to odd
    on the way.
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    values = values.contiguous()
    bits = values.float().view(torch.int32)
    result = bits.sub_(1).view(torch.float32).to(dtype)
    other = bits.add_(2).view(torch.float32).to(dtype)
    # Numbers are compared by their bits, several at a time where the size allows it.
    word = torch.int64 if values.numel() % 4 == 0 else torch.int16
    found, above = (half.flatten().view(word) for half in (result, other))
    near = torch.ne(found, above).nonzero().squeeze(1)
    if len(near):
        groups = values.view(len(found), -1)[near]
        found[near] = _by_odd(groups).to(dtype).view(word).squeeze(1)
    return result


def _by_odd(values: torch.Tensor) -> torch.Tensor:
    """fp64 to fp32, to odd: a second rounding to a half type is then the only one that counts.

    Boldo and Melquiond, "When double rounding is odd", 2005.
    """
    near = values.float()
    gap = values - near.double()
    even = (near.view(torch.int32) & 1) == 0
    other = torch.nextafter(near, torch.where(gap > 0, torch.inf, -torch.inf).float())
    return torch.where(even & (gap != 0) & near.isfinite(), other, near)


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of ``dtype`` around each fp64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    size = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    return size.clamp_min(info.smallest_normal * info.eps)
