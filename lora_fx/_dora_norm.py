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
    up = b.detach().to(wide).reshape(groups, -1, b.shape[1])
    own = up.new_zeros(up.shape[:2])
    crossed, gram = torch.zeros_like(up), up.new_zeros(groups, up.shape[2], up.shape[2])
    with _full_precision(weight):
        for matrix, down in _matrices(weight.detach(), a.detach().to(wide), layout, groups):
            squares, products = _against(matrix, down)
            own, crossed, gram = own + squares, crossed + products, gram + down @ down.mT
        square = own + 2 * scale * (crossed * up).sum(2) + scale**2 * ((up @ gram) * up).sum(2)
    # Where B A takes all of W away, what is left of the three may be below zero.
    return square.clamp_min(0).sqrt().flatten()


def _matrices(
    weight: Tensor, a: Tensor, layout: str, groups: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and A as matrices for each group, [g, out/g, n] and [g, r/g, n]: views of the weight."""
    if layout == "in_out" and weight.dim() == 2:
        yield weight.T.unsqueeze(0), a.unsqueeze(0)
    elif layout == "in_out":
        kernels, downs = (torch.unflatten(t.flatten(2), 0, (groups, -1)) for t in (weight, a))
        for place in range(kernels.shape[3]):
            yield kernels[..., place].mT, downs[..., place]
    else:
        # A weight may be stored with its channels last: it is read in the order in which it lies.
        strides = weight.stride()
        order = sorted(range(1, weight.dim()), key=lambda axis: -strides[axis])
        matrix, down = (t.permute(0, *order).flatten(1) for t in (weight, a))
        yield (
            torch.unflatten(matrix, 0, (groups, -1)),
            torch.unflatten(down, 0, (groups, -1)),
        )


def _against(matrix: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """``‖W‖²`` and ``W Aᵀ`` by row; a half-precision weight is widened piece by piece."""
    if matrix.dtype == down.dtype:
        return _squares(matrix), matrix @ down.mT
    count = min(_PIECES, -(-matrix.numel() // _CHUNK))
    squares, products = [], []
    for piece in matrix.chunk(max(1, count), dim=1):
        wide = piece.to(down.dtype)
        squares.append(_squares(wide))
        products.append(wide @ down.mT)
    return torch.cat(squares, dim=1), torch.cat(products, dim=1)


def _squares(matrix: Tensor) -> Tensor:
    """``Σ w²`` by row, in blocks: a kernel may add up a long row one by one, and lose its last digits."""
    whole = matrix.shape[2] - matrix.shape[2] % _BLOCK
    blocks = torch.unflatten(matrix[..., :whole], 2, (-1, _BLOCK))
    rest: Tensor = torch.linalg.vector_norm(matrix[..., whole:], dim=2)
    sums: Tensor = torch.linalg.vector_norm(blocks, dim=3)
    return sums.square().sum(2) + rest.square()


def _full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Takes autocast off: its half types are too coarse for a sum of squares."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
