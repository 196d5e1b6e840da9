"""The norm of an adapted weight without the adapted weight: nothing of the size of W is made.

Row by row, with P = W Aᵀ::

    ‖W + s·BA‖² = ‖W‖² + 2s · Σᵣ P ∘ B + s² · Σᵣ B (A Aᵀ) ∘ B
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["weight_norm"]

_CHUNK = 1 << 20  # elements of a half-precision weight that are widened at a time, at least
_BLOCK = 512  # numbers that are summed at once
_PIECES = 16  # and into how many pieces a weight is cut at most


@torch.no_grad()
def weight_norm(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, layout: str = "out_in", groups: int = 1
) -> Tensor:
    """The Euclidean norm of every output feature of ``W + s·BA``, over its inputs and kernel.

    Args:
        weight: [out, in/g, *k], or with the first two swapped ([in, out/g, *k]) for ``layout="in_out"``.
        a: [r, in/g, *k].
        b: [out, r/g, 1, ...].
        scale: s.
        layout: How the weight is stored.
        groups: g, of a convolution.

    Returns:
        [out], detached, in fp32, or fp64 for an fp64 weight.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    up = b.detach().to(wide)
    # Three dimensions only for groups: what an operation costs by itself is much beside a small weight.
    up = up.reshape(groups, -1, b.shape[1]) if groups > 1 else up.flatten(1)
    sums: tuple[Tensor, ...] | None = None
    with _full_precision(weight):
        for matrix, down in _matrices(weight.detach(), a.detach().to(wide), layout, groups):
            products, squares = _against(matrix, down)
            parts = (squares, products, down @ down.mT)
            sums = parts if sums is None else tuple(map(torch.add, sums, parts))
        assert sums is not None  # a kernel has a place
        own, crossed, gram = sums
        add_product = torch.addmm if groups == 1 else torch.baddbmm
        mixed = add_product(crossed, up, gram, beta=2 * scale, alpha=scale**2)
        square = own + (mixed * up).sum(-1)
    # Where B A takes all of W away, what is left of the three may be below zero.
    return square.clamp_min(0).sqrt().flatten()


def _matrices(
    weight: Tensor, a: Tensor, layout: str, groups: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and A as [out, n] and [r, n], or [g, out/g, n] and [g, r/g, n]: views of the weight."""
    if layout == "in_out" and weight.dim() == 2:
        yield weight.T, a
    elif layout == "in_out":
        kernels, downs = weight.flatten(2), a.flatten(2)
        if groups > 1:
            kernels, downs = (torch.unflatten(t, 0, (groups, -1)) for t in (kernels, downs))
        for place in range(kernels.shape[-1]):
            yield kernels[..., place].mT, downs[..., place]
    else:
        matrix, down = weight, a
        if weight.dim() > 2:
            # A weight may be stored with its channels last: it is read in the order in which it lies.
            strides = weight.stride()
            order = sorted(range(1, weight.dim()), key=lambda axis: -strides[axis])
            matrix, down = (t.permute(0, *order).flatten(1) for t in (weight, a))
        if groups > 1:
            matrix, down = (torch.unflatten(t, 0, (groups, -1)) for t in (matrix, down))
        yield matrix, down


def _against(matrix: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """``W Aᵀ`` and ``‖W‖²`` by row; a half-precision weight is widened piece by piece."""
    if matrix.dtype == down.dtype:
        return matrix @ down.mT, _squares(matrix)
    count = min(_PIECES, -(-matrix.numel() // _CHUNK))
    products, squares = [], []
    for piece in matrix.chunk(max(1, count), dim=-2):
        wide = piece.to(down.dtype)
        products.append(wide @ down.mT)
        squares.append(_squares(wide))
    return torch.cat(products, dim=-2), torch.cat(squares, dim=-1)


def _squares(matrix: Tensor) -> Tensor:
    """``Σ w²`` by row, in blocks: a kernel may add up a long row one by one, and lose its last digits."""
    whole = matrix.shape[-1] - matrix.shape[-1] % _BLOCK
    rest: Tensor = torch.linalg.vector_norm(matrix[..., whole:], dim=-1).square()
    if not whole:
        return rest
    blocks = torch.unflatten(matrix[..., :whole], -1, (-1, _BLOCK))
    sums: Tensor = torch.linalg.vector_norm(blocks, dim=-1).square().sum(-1)
    return sums + rest


def _full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Takes autocast off: its half types are too coarse for a sum of squares."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
