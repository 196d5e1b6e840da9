"""Round a matrix so that its product with typical inputs changes least.

The error of an output is ``(W - Q) x``. Its mean square over inputs with the second moments ``H = E[x xᵀ]``
is ``tr((W - Q) H (W - Q)ᵀ)``. Rounding to nearest ignores H. Here the errors of earlier columns are added to
a column before it is rounded, weighted by a factorization of H. That is LDLQ (Chee et al. 2023,
arXiv:2307.13304), which is equal to GPTQ (Frantar et al. 2022, arXiv:2210.17323). Then each column is
chosen once more while all others stay (coordinate descent: Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from lora_fx.errors import MergeError
from lora_fx.formats import Grid
from lora_fx.ir import PlannedSite, Site

__all__ = [
    "NEAREST",
    "Rounding",
    "RoundingName",
    "compensated",
    "is_matrix_product",
    "matrix_of",
    "stochastic",
]

RoundingName = Literal["nearest", "compensated", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The way in which merged weights are rounded.

    Attributes:
        name: ``nearest``; ``compensated``, with error feedback; or ``stochastic``, up or down at random.
        moments: Second moments of the inputs of sites, by their names, [in, in]. Sites without them have
            feedback along each row.
        seed: The seed of random rounding.
    """

    name: RoundingName = "nearest"
    moments: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @classmethod
    def named(cls, name: str, *, seed: int = 0) -> Rounding:
        """Return the rounding method with a name: ``nearest``, ``compensated`` or ``stochastic``.

        Raises:
            MergeError: If the name is unknown, or the seed is not a whole number.
        """
        if name not in get_args(RoundingName):
            names = ", ".join(map(repr, get_args(RoundingName)))
            raise MergeError(f"rounding={name!r} is unknown: use {names}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise MergeError(f"seed={seed!r}: it is a whole number")
        return cls(cast("RoundingName", name), seed=seed)

    def round(
        self, exact: torch.Tensor, grid: Grid, rows: tuple[PlannedSite, ...]
    ) -> torch.Tensor | None:
        """Round a merged weight to the values of a grid, by error feedback or at random.

        Args:
            exact: The merged weight, in its own shape.
            grid: The possible values of its matrix [out, in].
            rows: The planned sites of the weight.

        Returns:
            fp32, in the shape of the weight. None for rounding to nearest, which the caller does, and if the
            sites are not products with a matrix.
        """
        matrix = matrix_of(rows[0].site, exact)
        if self.name == "nearest" or matrix is None:
            return None
        result = matrix.float().contiguous()
        for site in {row.site.rows: row.site for row in rows}.values():
            first, last = site.rows or (0, len(matrix))
            part, within = matrix[first:last], grid.rows(first, last)
            if self.name == "stochastic":
                # Weights of one shape must not have the same noise.
                number = zlib.crc32(f"{self.seed} {site.name}".encode())
                generator = torch.Generator(matrix.device).manual_seed(number)
                result[first:last] = stochastic(part, within, generator)
            else:
                moments = self.moments.get(site.name)
                known = _row_moments(matrix.shape[1]) if moments is None else moments
                result[first:last] = compensated(part, within, known)
        turned = result.T if rows[0].site.layout == "in_out" else result
        return turned.contiguous()


NEAREST = Rounding()


def is_matrix_product(site: Site) -> bool:
    """Return True if a site is a plain product of vectors with a matrix, which error feedback needs."""
    plain = site.family == "linear" and site.experts is None and site.groups == 1
    return plain and site.view is None and site.order is None and len(site.weight_shape) == 2


def matrix_of(site: Site, weight: torch.Tensor) -> torch.Tensor | None:
    """Return a weight as the matrix [out, in] by which inputs are multiplied; None for other operations."""
    if not is_matrix_product(site):
        return None
    return weight.T if site.layout == "in_out" else weight


_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, as in GPTQ."""
_BLOCK = 32
_ELEMENTS = 1 << 24
"""Elements of a matrix that are rounded at a time."""


def _row_moments(columns: int) -> torch.Tensor:
    """Return the second moments to assume for unknown inputs, [columns, columns].

    With these, the rounding errors along a row add up to about zero.
    """
    return torch.eye(columns) + 1


@torch.no_grad()
def compensated(values: torch.Tensor, grid: Grid, moments: torch.Tensor) -> torch.Tensor:
    """Round a matrix to values of a grid, with small errors of its products.

    Args:
        values: [out, in], any floating-point dtype.
        grid: The possible values.
        moments: The second moments of the inputs, [in, in], in any scale.

    Returns:
        fp32, [out, in].
    """
    with torch.autocast(values.device.type, enabled=False):
        return _compensated(values, grid, moments)


def _compensated(values: torch.Tensor, grid: Grid, moments: torch.Tensor) -> torch.Tensor:
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
    """Return the factor U of ``H = U D Uᵀ``: upper triangular, with ones on its diagonal."""
    lower: torch.Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


def _fed_forward(targets: torch.Tensor, grid: Grid, upper: torch.Tensor) -> torch.Tensor:
    """Round a matrix column by column, and add the error of each column to later columns.

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
    """Round each column once more, to the best values while all other columns stay.

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
