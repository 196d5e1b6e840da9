"""Starts from statistics of data: CorDA from inputs, LoRA-GA from gradients. Both change the base.

What they are given is collected by ``lora_fx/adapters/statistics.py``; EVA's components are A as they are, and need
nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from lora_fx.errors import ConfigError
from lora_fx.passes.insert.start_weight import low_rank_svd, signs

__all__ = ["corda", "lora_ga"]

_DAMPING: Final = 0.01
_INVERSE_ERROR: Final = 0.05
_ITERATIONS: Final = 4


def corda(
    matrix: torch.Tensor, moments: torch.Tensor, rank: int, scale: float, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """CorDA (Yang et al. 2024, arXiv:2406.05223): ``W = (U S Vᵀ) C⁻¹`` of ``W C = U S Vᵀ``.

    Args:
        matrix: W, [out, in].
        moments: C, the second moments of the inputs, [in, in].
        rank: The rank.
        scale: What the branch is scaled by.
        method: ``ipm`` takes the largest singular values, ``kpm`` the smallest.

    Returns:
        A [r, in] and B [out, r].

    Raises:
        ConfigError: If no damping makes the moments invertible.
    """
    damped, inverse = _inverted(moments.to(matrix))
    u, s, vh = torch.linalg.svd(matrix @ damped, full_matrices=False)
    taken = slice(0, rank) if method == "ipm" else slice(len(s) - rank, len(s))
    root = (s[taken] / scale).sqrt()
    return root[:, None] * (vh[taken] @ inverse), u[:, taken] * root


def _inverted(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments with as much of a multiple of the identity as they need, and the inverse of that."""
    one = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal().mean()
    damping = _DAMPING
    while damping < 1e6 and mean > 0:
        damped = moments + one * (mean * damping)
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, one) < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise ConfigError(
        "init_lora_weights='corda': the second moments of its inputs cannot be inverted (are they all "
        "zero?); give more data, or leave it out with exclude_modules"
    )


def lora_ga(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    rank: int,
    scale: float,
    options: Mapping[str, Any],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA-GA (Wang et al. 2024, arXiv:2407.05000): the first step is close to that of full training.

    With ``G = U S Vᵀ``, A has r of the first 2r rows of Vᵀ and B r of the first 2r columns of ``U S``;
    ``direction`` says which.

    Args:
        weight: W, [n, out, in].
        gradient: G, the gradient of the loss, likewise.
        rank: The rank.
        scale: What the branch is scaled by.
        options: ``lora_ga_config``.
        generator: For the decomposition, and for the direction ``random``.

    Returns:
        A [n, r, in] and B [n, out, r].
    """
    size = min(4 * rank, *gradient.shape[1:])
    u, s, vh = low_rank_svd(gradient, size, _ITERATIONS, generator)
    # A and B have other triples, so that their product depends on the signs.
    sign = signs(vh)
    u, vh = u * sign[:, None], vh * sign[:, :, None]
    of_a, of_b = _directions(options["direction"], rank, generator)
    a, b, values = vh[:, of_a], u[:, :, of_b] * s[:, None, of_b], s[:, of_b]
    if options["scale"] == "stable":
        return a, b * (weight.shape[1] ** 0.25 / options["stable_gamma"] ** 0.5)
    if options["scale"] == "weight_svd":
        largest = torch.linalg.matrix_norm(weight, 2)
        ratio = torch.where(values[:, 0] > 0, largest / values[:, 0], 1.0)
        return a, b * ratio[:, None, None]
    if options["scale"] == "gd_scale":
        return a / scale, b / scale
    return a, b


def _directions(
    direction: str, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the first 2r singular triples A takes, and which B."""
    every = torch.arange(2 * rank)
    if direction == "random":
        some = torch.randperm(2 * rank, generator=generator)[:rank]
        return some, some
    first, second = every[:rank], every[rank:]
    return {
        "ArBr": (every[1::2], every[0::2]),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }[direction]
