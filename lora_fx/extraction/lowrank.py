"""Factors of low rank for changes of weights: the choice of the ranks, and the decomposition.

The factors ``B A`` of rank r that are closest to a change ``ΔW`` are its r leading singular triples (Eckart
and Young 1936). With second moments ``H = L Lᵀ`` of the inputs, those of ``ΔW L`` change the outputs least:
the mean square of the output error is ``‖(ΔW - B A) L‖²`` (as in CorDA, arXiv:2406.05223, and in SVD-LLM,
arXiv:2403.07378).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from lora_fx.errors import ConfigError
from lora_fx.passes.insert import low_rank_svd

__all__ = [
    "DEFAULT_RANK",
    "RankChoice",
    "allocate",
    "decompose",
    "rank_of_energy",
    "root_of",
    "spectrum",
]

DEFAULT_RANK: Final = 16

_OVERSAMPLED: Final = 16
_ITERATIONS: Final = 4
_DAMPING: Final = 1e-6
_UNITS: Final = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclasses.dataclass(frozen=True)
class RankChoice:
    """The rule for the rank of each site. At most one of the three is set.

    Attributes:
        rank: The same rank for all sites; a smaller one where a matrix has no more.
        energy: Each site gets the smallest rank that keeps this share of ``‖ΔW‖²``, in (0, 1].
        budget: The number of elements of the whole adapter. Ranks go to the sites where they keep most of
            ``‖ΔW‖²`` for their size.
    """

    rank: int | None = DEFAULT_RANK
    energy: float | None = None
    budget: int | None = None

    @classmethod
    def of(
        cls, rank: int | None = None, energy: float | None = None, budget: int | str | None = None
    ) -> RankChoice:
        """Return a choice from the arguments of a caller. Without any, the rank is 16.

        Args:
            rank: A rank.
            energy: A share.
            budget: A number of parameters, or a size such as "20MB" for parameters of 4 bytes.

        Raises:
            ConfigError: If several are given, or a value is out of range.
        """
        named = {"rank": rank, "energy": energy, "budget": budget}
        chosen = [name for name, value in named.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigError(
                f"{' and '.join(chosen)} are given: the ranks follow from one of rank, energy and budget"
            )
        if rank is not None and not (type(rank) is int and rank > 0):
            raise ConfigError(f"rank: found {rank!r}; a whole number of at least 1 is needed")
        if energy is not None and not (_is_number(energy) and 0 < energy <= 1):
            raise ConfigError(
                f"energy: found {energy!r}; it is the share of ‖ΔW‖² to keep, above 0 and at most 1"
            )
        return cls(
            rank=DEFAULT_RANK if not chosen else rank,
            energy=None if energy is None else float(energy),
            budget=None if budget is None else _parameters(budget),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parameters(budget: int | str) -> int:
    """Return a number of parameters from a number, or from a size in bytes with its unit."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", str(budget), re.IGNORECASE)
    if isinstance(budget, str) and match is not None:
        count = int(float(match[1]) * _UNITS[match[2].upper()]) // 4
        if count > 0:
            return count
    raise ConfigError(
        f"budget: found {budget!r}; give a number of parameters, or a size such as '20MB' (4 bytes each)"
    )


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
    squares: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return the rank of each site, so that all factors together keep most within a budget.

    Greedy: the next rank goes to the site whose next singular value keeps most for its size. Singular values
    fall, so that no other choice of the same size keeps more, up to the size of one rank.

    Args:
        squares: The squared singular values of each site, in descending order.
        costs: The number of elements of the factors of each site, for a rank of 1.
        budget: The largest number of elements of all factors.

    Returns:
        The ranks; 0 for sites that get nothing.
    """
    ranks = dict.fromkeys(squares, 0)
    queue = [(-float(values[0]) / costs[name], name) for name, values in squares.items()]
    heapq.heapify(queue)
    left = budget
    while queue:
        gain, name = heapq.heappop(queue)
        if gain == 0 or costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(squares[name]):
            heapq.heappush(queue, (-float(squares[name][ranks[name]]) / costs[name], name))
    return ranks


def decompose(matrices: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the factors of a rank whose product is closest to a change.

    Args:
        matrices: The change, [n, out, in].
        rank: The rank, at most the smaller side of a matrix.
        root: L, from :func:`root_of`. Distances are those of the outputs then.

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
    """Return the Cholesky factor L of second moments ``H = L Lᵀ`` [in, in], damped until they have one."""
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
