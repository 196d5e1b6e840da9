r"""How tensors of several tasks become one, element by element.

``Σ wᵢ Tᵢ`` is task arithmetic (arXiv:2212.04089). Before the sum a tensor can lose elements: those of
small magnitude, or random ones with the rest scaled up (DARE, arXiv:2311.03099). TIES
(arXiv:2306.01708) elects a sign for every element and averages those that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

__all__ = ["Election", "average_of_majority", "keep_largest", "keep_random", "weighted_sum"]

Election = Literal["total", "frequency"]
"""What elects a sign: the sum of the values, or the number of positive against negative ones."""


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Zeros all but the ``⌊density · n⌋`` elements of the largest magnitude."""
    count = int(density * tensor.numel())
    kept = tensor.abs().flatten().topk(count).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[kept] = True
    return tensor.where(mask.view(tensor.shape), 0)


def keep_random(
    tensor: torch.Tensor, density: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Keeps each element with probability ``density`` and divides it by that: DARE.

    Args:
        tensor: Any shape.
        density: In (0, 1].
        generator: Where the draw comes from; torch's own by default.
    """
    # Nothing is drawn where nothing can be dropped: later draws do not move.
    if density == 1:
        return tensor
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * kept / density


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """``Σ wᵢ Tᵢ``."""
    return (torch.stack(tuple(tensors)) * _column(weights, tensors[0])).sum(0)


def average_of_majority(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], election: Election
) -> torch.Tensor:
    """The mean of the weighted elements that have the elected sign; 0 where none has.

    The weights do not vote, and a draw goes to the positive sign.
    """
    stack = torch.stack(tuple(tensors))
    votes = (stack if election == "total" else stack.sign()).sum(0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    chosen = (stack * _column(weights, stack[0])).where(agrees, 0).sum(0)
    return chosen / agrees.sum(0).clamp_min(1)


def _column(weights: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(weights, dtype=like.dtype, device=like.device)
    return values.view(-1, *(1 for _ in like.shape))
