"""Starts that are a part of the weight: its leading directions, which are then taken out of it.

PiSSA (Meng et al. 2024, arXiv:2404.02948) takes the r largest singular values,
``B = U √(S/s)``, ``A = √(S/s) Vᵀ``; OLoRA (Büyükakyüz 2024, arXiv:2406.01775) the first columns of a QR
decomposition, ``B = Q``, ``A = R``. Either way the base becomes ``W - s · B A``.
"""

from __future__ import annotations

import torch

__all__ = ["low_rank_svd", "olora", "pissa", "signs"]


def pissa(
    matrices: torch.Tensor,
    rank: int,
    scale: float,
    iterations: int | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [n, r, in] and B [n, out, r] of matrices [n, out, in].

    Args:
        matrices: The weight.
        rank: Their rank.
        scale: What the branch is scaled by.
        iterations: For the fast decomposition, which is approximate; None for the exact one.
        generator: For the fast one's random projection.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    else:
        u, s, vh = low_rank_svd(matrices, rank, iterations, generator)
    root = (s[:, :rank] / scale).sqrt()
    return root[:, :, None] * vh[:, :rank], u[:, :, :rank] * root[:, None, :]


def olora(matrices: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [n, r, in] and B [n, out, r] of matrices [n, out, in]."""
    q, r = torch.linalg.qr(matrices)
    return r[:, :rank], q[:, :, :rank]


def signs(directions: torch.Tensor) -> torch.Tensor:
    """What makes the largest entry of each direction positive: a decomposition leaves the sign open.

    Args:
        directions: [..., in].

    Returns:
        1 or -1, [...].
    """
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest < 0, -1.0, 1.0).to(directions)


def low_rank_svd(
    matrices: torch.Tensor, size: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triples by subspace iteration (Halko et al. 2009, arXiv:0909.4061, 4.4 and 5.1).

    What :func:`torch.svd_lowrank` computes, from a generator of one's own: the same on every device, and
    whatever was drawn before.

    Args:
        matrices: [n, rows, columns].
        size: Dimension of the subspace; with all there is, the result is exact.
        iterations: How often the subspace is multiplied through.
        generator: On the CPU.

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
