"""Rounding once, and measuring how well."""

from __future__ import annotations

import torch

__all__ = ["round_into", "rounded", "rounding_memory", "ulp"]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds once, as :func:`round_into`."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    round_into(result, values)
    return result


def round_into(
    result: torch.Tensor, values: torch.Tensor, scratch: torch.Tensor | None = None
) -> None:
    """Rounds once. PyTorch casts fp64 to a half type by way of fp32, which would round twice.

    A value lies between the two neighbours of what it is in fp32. Where both round to the same number,
    so does the value; the few others are close to half-way between two numbers, and are rounded to odd
    on the way.

    Args:
        result: What is written.
        values: The values, of the same shape.
        scratch: :func:`rounding_memory`, for callers that round many slices: new memory takes longer than
            the rounding itself.
    """
    if scratch is None:
        scratch = rounding_memory(result.dtype, values)
    if scratch is None or not values.numel():
        result.copy_(values)
        return
    size, values = values.numel(), values.reshape(-1)
    near, rest = scratch[:size], scratch[size : 2 * size].view(result.dtype)
    low, high = rest[:size], rest[size:]
    bits = near.copy_(values).view(torch.int32)
    low.copy_(bits.sub_(1).view(torch.float32))
    high.copy_(bits.add_(2).view(torch.float32))
    # Numbers are compared by their bits, several at a time where the size allows it.
    word = torch.int64 if size % 4 == 0 else torch.int16
    found = low.view(word)
    unsure = torch.ne(found, high.view(word)).nonzero().squeeze(1)
    if len(unsure):
        groups = values.view(len(found), -1)[unsure]
        found[unsure] = _by_odd(groups).to(result.dtype).view(word).squeeze(1)
    result.copy_(low.view(result.shape))


def rounding_memory(dtype: torch.dtype, values: torch.Tensor) -> torch.Tensor | None:
    """What :func:`round_into` works in: two fp32 elements a value; None where it needs no memory.

    Args:
        dtype: What is rounded to.
        values: The values, or as many as are rounded at a time.
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return None
    return torch.empty(2 * values.numel(), device=values.device)


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
