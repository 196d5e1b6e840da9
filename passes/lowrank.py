"""Low-rank approximation: the factors closest to a matrix, and ranks for several matrices within a budget.

The product ``B A`` of rank r that is closest to a matrix consists of its r leading singular triples (Eckart
and Young 1936). With second moments ``H = L Lᵀ`` of the inputs, the leading triples of ``ΔW L`` have the
smallest error of the outputs. The mean square of that error is ``‖(ΔW - B A) L‖²`` (as in CorDA,
arXiv:2406.05223, and in SVD-LLM, arXiv:2403.07378).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "allocate",
    "decompose",
    "low_rank_svd",
    "rank_of_energy",
    "root_of",
    "spectrum",
]

_OVERSAMPLED: Final = 16
_ITERATIONS: Final = 4
_DAMPING: Final = 1e-6


def low_rank_svd(
    matrices: torch.Tensor, size: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return leading singular triples by subspace iteration (Halko et al. 2009, arXiv:0909.4061, 4.4, 5.1).

    Same as :func:`torch.svd_lowrank`, but with a given random generator. So the result is the same on every
    device, and independent of earlier random draws.

    Args:
        matrices: [n, rows, columns].
        size: Dimension of the subspace. With the full dimension the result is exact.
        iterations: Number of iterations.
        generator: A generator on the CPU.

    Returns:
        U [n, rows, size], S [n, size], Vᴴ [n, size, columns].
    """
    count, rows, columns = matrices.shape
    if size >= min(rows, columns):
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u, s, vh
    if rows < columns:
        u, s, vh = low_rank_svd(matrices.mT, size, iterations, generator)
        return vh.mT, s, u.mT
    drawn = torch.empty(count, columns, size, dtype=matrices.dtype).normal_(generator=generator)
    basis = torch.linalg.qr(matrices @ drawn.to(matrices.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrices.mT @ basis).Q
        basis = torch.linalg.qr(matrices @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrices, full_matrices=False)
    return basis @ u, s, vh


def spectrum(matrices: Tensor) -> Tensor:
    """Return the squares of the singular values of matrices, summed over the matrices, in descending order.

    Args:
        matrices: [n, out, in].

    Returns:
        fp64, [min(out, in)].
    """
    exact = matrices.double()
    gram = exact @ exact.mT if exact.shape[1] <= exact.shape[2] else exact.mT @ exact
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).flip(-1).sum(0)


def rank_of_energy(squares: Tensor, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps a share of the sum of squares.

    Args:
        squares: As from :func:`spectrum`.
        energy: The share. 1 keeps everything but rounding errors.
    """
    total = float(squares.sum())
    if not total:
        return 1
    # Squares below this share of the largest are rounding errors of fp32 weights.
    lost = total - squares.cumsum(0)
    allowed = max(1 - energy, torch.finfo(torch.float32).eps ** 2 * len(squares)) * total
    return int((lost > allowed).sum()) + 1


def allocate(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return the rank of each matrix that together gain most within a budget.

    The choice is greedy: the next rank goes to the matrix with the largest gain per cost, until nothing fits.
    Each further rank of a matrix gains less, so no other choice of the same cost gains more, up to the cost
    of one rank. Among equal gains, the matrix with the smaller rank comes first.

    Args:
        gains: For each matrix by name, the gain of each further rank, in descending order: squared singular
            values.
        costs: For each matrix by name, the cost of increasing its rank by one.
        budget: The largest total cost.
    """
    ranks = dict.fromkeys(gains, 0)
    order = {name: index for index, name in enumerate(gains)}
    queue: list[tuple[float, int, int, str]] = []

    def add(name: str) -> None:
        rank = ranks[name]
        if rank < len(gains[name]):
            heapq.heappush(queue, (-gains[name][rank] / costs[name], rank, order[name], name))

    for name in gains:
        add(name)
    left = budget
    while queue:
        _, _, _, name = heapq.heappop(queue)
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
            add(name)
    return ranks


def decompose(matrices: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return factors of a given rank whose product is closest to a change of a weight.

    Args:
        matrices: The change, [n, out, in].
        rank: The rank, at most the smaller side of a matrix.
        root: L, from :func:`root_of`, to minimize the error of the outputs instead of that of the weight.

    Returns:
        A [n, r, in] and B [n, out, r]. They have equal norms, or one of them is the identity: at full rank
        the product is exact then.
    """
    count, out, inner = matrices.shape
    if rank == min(out, inner):
        identity = torch.eye(rank).to(matrices).expand(count, rank, rank)
        return (matrices, identity) if out <= inner else (identity, matrices)
    u, s, vh = _leading(matrices if root is None else matrices @ root, rank)
    scale = s.sqrt()
    a, b = scale[:, :, None] * vh, u * scale[:, None, :]
    if root is not None:
        a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
    return a, b


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples, by subspace iteration if the rank is far from full."""
    size = rank + _OVERSAMPLED
    if 4 * size >= min(matrices.shape[1:]):
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        u, s, vh = low_rank_svd(matrices, size, _ITERATIONS, generator)
    return u[:, :, :rank], s[:, :rank], vh[:, :rank]


def root_of(moments: Tensor) -> Tensor:
    """Return the Cholesky factor L of second moments ``H = L Lᵀ`` [in, in], damped until it exists."""
    mean = float(moments.diagonal().mean())
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    damping = _DAMPING
    while damping < 1 and mean > 0 and math.isfinite(mean):
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(moments + identity * (damping * mean))
        if not failed:
            return lower
        damping *= 10
    return identity
