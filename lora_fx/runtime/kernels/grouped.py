"""Conversions of the factors of grouped convolutions: between dense factors and the blocks of the groups."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["between_groups", "of_groups"]


def of_groups(b: Tensor, groups: int) -> Tensor:
    """Return the B of a grouped convolution, [out, r/g, ...], as a dense one, [out, r, ...]."""
    blocks = b.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]
    own = torch.eye(groups, dtype=b.dtype, device=b.device)
    dense = torch.einsum("gor...,gh->gohr...", blocks, own)
    return dense.flatten(0, 1).flatten(1, 2)


def between_groups(a: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Split a dense A, [r, in, ...], into the blocks of the groups, [r, in/g, ...], and all other values.

    Returns:
        The values for the channels of each row's own group, and a detached copy of A with zeros in their
        place, [g, r/g, g, in/g, ...].
    """
    rows = a.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # type: ignore[no-untyped-call]
    index = torch.arange(groups, device=a.device)
    own = rows[index, :, index]
    outside = rows.detach().clone()
    outside[index, :, index] = 0
    return own.flatten(0, 1), outside
