"""Round a matrix so that its product with typical inputs changes least.

The error of an output is ``(W - Q) x``. Its mean square over inputs with the second moments ``H = E[x xᵀ]`` is
``tr((W - Q) H (W - Q)ᵀ)``. Rounding to nearest ignores H. Here each column is rounded after the errors of the
columns before it were added, weighted by a factorization of H (LDLQ: Chee et al. 2023, arXiv:2307.13304,
which is equal to GPTQ: Frantar et al. 2022, arXiv:2210.17323). Then each column is chosen once more while all
others stay (coordinate descent: Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

import torch

from lora_fx.formats import Grid

__all__ = ["compensated", "row_moments", "stochastic"]

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, as in GPTQ."""
_BLOCK = 32
_ELEMENTS = 1 << 24
"""Elements of a matrix that are rounded at a time."""


def row_moments(columns: int) -> torch.Tensor:
    """Return second moments for unknown inputs: errors along a row should add up to zero."""
    return torch.eye(columns) + 1


def compensated(values: torch.Tensor, grid: Grid, moments: torch.Tensor) -> torch.Tensor:
    """Round a matrix to values of a grid, with small errors of its products.

    Args:
        values: [out, in], any floating-point dtype.
        grid: The possible values.
        moments: The second moments of the inputs, [in, in], in any scale.

    Returns:
        fp32, [out, in].
    """
    moments = moments.to(values.device, torch.float32).clone()
    moments.diagonal().add_(moments.diagonal().mean().clamp_min(1e-30) * _DAMPING)
    upper = _unit_factor(moments)
    parts = []
    for first in range(0, len(values), rows := max(1, _ELEMENTS // values.shape[1])):
        part = values[first : first + rows]
        targets = part.T.to(torch.float32).contiguous()
        within = grid.rows(first, first + len(part))
        errors = _fed_forward(targets, within, upper)
        parts.append(_improved(targets, errors, within, moments).T)
    return torch.cat(parts).contiguous()


def stochastic(values: torch.Tensor, grid: Grid, generator: torch.Generator | None) -> torch.Tensor:
    """Round each element up or down at random, so that its expected value stays the same.

    Args:
        values: [out, in], any floating-point dtype.
        grid: The possible values.
        generator: The source of random numbers, on the device of the values.

    Returns:
        fp32, [out, in].
    """
    columns = values.T.to(torch.float32).contiguous()
    noise = torch.rand(columns.shape, generator=generator, device=columns.device) - 0.5
    for index, column in enumerate(columns):
        shifted = torch.addcmul(column, grid.spacing(column, index), noise[index])
        column.copy_(grid.nearest(shifted, index))
    return columns.T.contiguous()


def _unit_factor(moments: torch.Tensor) -> torch.Tensor:
    """Return U with a diagonal of ones, upper triangular, of ``H = U D Uᵀ``."""
    lower: torch.Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


def _fed_forward(targets: torch.Tensor, grid: Grid, upper: torch.Tensor) -> torch.Tensor:
    """Round column by column, and add the errors to later columns.

    Args:
        targets: The matrix transposed, [in, out].
        grid: The possible values.
        upper: The factor of the second moments.

    Returns:
        The errors ``W - Q``, [in, out].
    """
    errors = torch.empty_like(targets)
    for start in range(0, len(targets), _BLOCK):
        stop = min(start + _BLOCK, len(targets))
        wanted = torch.addmm(targets[start:stop], upper[:start, start:stop].T, errors[:start])
        for at in range(start, stop):
            error = torch.sub(targets[at], grid.nearest(wanted[at - start], at), out=errors[at])
            wanted[at - start + 1 :].addr_(upper[at, at + 1 : stop], error)
    return errors


def _improved(
    targets: torch.Tensor, errors: torch.Tensor, grid: Grid, moments: torch.Tensor
) -> torch.Tensor:
    """Choose each column once more, the best one beside all others.

    Args:
        targets: The matrix transposed, [in, out].
        errors: ``W - Q`` so far; changed in place.
        grid: The possible values.
        moments: H.

    Returns:
        Q transposed, [in, out].
    """
    chosen = targets - errors
    for start in range(0, len(targets), _BLOCK):
        stop = min(start + _BLOCK, len(targets))
        slopes = moments[start:stop] @ errors
        for at in range(start, stop):
            slope, before = slopes[at - start], chosen[at]
            best = grid.nearest(torch.add(before, slope, alpha=1 / float(moments[at, at])), at)
            change = best - before
            chosen[at] = best
            errors[at] -= change
            slopes[at - start + 1 :].addr_(moments[at, at + 1 : stop], change, alpha=-1)
    return chosen
