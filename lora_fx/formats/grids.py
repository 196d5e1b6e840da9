"""The values that a stored weight can hold: numbers of a floating-point dtype, or codes with scales.

Rounding with error feedback chooses among these values, one column of a matrix at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FP4_SIZES",
    "CodeGrid",
    "DtypeGrid",
    "Grid",
    "float8_levels",
    "fp4_levels",
    "integer_levels",
    "ulp",
]

FP4_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3), in the order of their codes."""


def integer_levels(bits: int, *, signed: bool = True) -> Tensor:
    """Return all integers that a number of bits can store, in ascending order."""
    first = -(1 << (bits - 1)) if signed else 0
    return torch.arange(first, first + (1 << bits))


def float8_levels(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of a dtype of 8 bits, once each."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return torch.tensor(sorted({*codes[codes.isfinite()].tolist()}))


def fp4_levels() -> Tensor:
    """Return all numbers of E2M1."""
    return torch.tensor([*FP4_SIZES, *(-size for size in FP4_SIZES[1:])])


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbors of ``dtype`` around each value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    size = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    return size.clamp_min(info.smallest_normal * info.eps)


class Grid(abc.ABC):
    """The values that the elements of a matrix [out, in] can have."""

    @abc.abstractmethod
    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Return the nearest possible values for a column, [out] in fp32."""

    @abc.abstractmethod
    def spacing(self, values: Tensor, column: int) -> Tensor:
        """Return the distance between the two possible values around each value of a column, [out]."""

    @abc.abstractmethod
    def rows(self, first: int, last: int) -> Grid:
        """Return the grid of the matrix's rows from ``first`` to ``last``, without the last."""


@dataclasses.dataclass(frozen=True, slots=True)
class DtypeGrid(Grid):
    """The numbers of a floating-point dtype.

    Attributes:
        dtype: The dtype, narrower than fp32.
    """

    dtype: torch.dtype

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """See :class:`Grid`."""
        return values.to(self.dtype).to(values.dtype)

    def spacing(self, values: Tensor, column: int) -> Tensor:
        """See :class:`Grid`. Between powers of two the distance is constant."""
        return ulp(values, self.dtype)

    def rows(self, first: int, last: int) -> DtypeGrid:
        """See :class:`Grid`."""
        return self


@dataclasses.dataclass(frozen=True)
class CodeGrid(Grid):
    """The values of codes that have scales: ``(level - zero) · scale``.

    Attributes:
        levels: The values of the codes, ascending, fp32.
        scales: fp32, [blocks of a row, out].
        blocks: The block of each column, [in].
        zeros: Zero points in the shape of the scales; None if the codes have no zero points.
    """

    levels: Tensor
    scales: Tensor
    blocks: tuple[int, ...]
    zeros: Tensor | None = None

    @classmethod
    def of_blocks(
        cls,
        levels: Tensor,
        scales: Tensor,
        shape: Sequence[int],
        width: int | None,
        zeros: Tensor | None = None,
        rows: int = 1,
    ) -> CodeGrid:
        """Return the grid of a matrix whose scales belong to blocks of the same size.

        Args:
            levels: The values of the codes, in any order.
            scales: [blocks of rows, blocks of a row].
            shape: The shape of the matrix, [out, in].
            width: The columns of a block; None for whole rows.
            zeros: Zero points in the shape of the scales.
            rows: The rows of a block. By default each row has separate scales.
        """
        out_features, in_features = shape
        size = width or in_features

        def spread(values: Tensor) -> Tensor:
            return values.float().repeat_interleave(rows, 0)[:out_features].T.contiguous()

        return cls(
            levels.float().sort().values,
            spread(scales),
            tuple(column // size for column in range(in_features)),
            None if zeros is None or not bool(zeros.any()) else spread(zeros),
        )

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """See :class:`Grid`."""
        levels = self._in_levels(values, column)
        if self._first is not None:
            levels = levels.round_().clamp_(self._first, self._first + len(self.levels) - 1)
        else:
            levels = self.levels[torch.bucketize(levels, self._between)]
        block = self.blocks[column]
        if self.zeros is not None:
            levels = levels.sub_(self.zeros[block])
        return levels.mul_(self.scales[block])

    def spacing(self, values: Tensor, column: int) -> Tensor:
        """See :class:`Grid`. Outside of the range it is zero."""
        levels = self._in_levels(values, column)
        above = torch.bucketize(levels, self.levels).clamp_(0, len(self.levels))
        return F.pad(self.levels.diff(), (1, 1))[above] * self.scales[self.blocks[column]]

    def rows(self, first: int, last: int) -> CodeGrid:
        """See :class:`Grid`."""
        zeros = None if self.zeros is None else self.zeros[:, first:last]
        return dataclasses.replace(self, scales=self.scales[:, first:last], zeros=zeros)

    def _in_levels(self, values: Tensor, column: int) -> Tensor:
        """Return values of a column divided by their scales and shifted by their zero points."""
        block = self.blocks[column]
        levels = values * self._factors[block]
        return levels if self.zeros is None else levels.add_(self.zeros[block])

    @functools.cached_property
    def _factors(self) -> Tensor:
        """The inverses of the scales; zero for a scale of zero."""
        return torch.where(self.scales > 0, 1 / self.scales, 0)

    @functools.cached_property
    def _between(self) -> Tensor:
        """The midpoints of neighboring levels, at which rounding changes."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    @functools.cached_property
    def _first(self) -> float | None:
        """The smallest level, if the levels are consecutive integers."""
        first = float(self.levels[0])
        whole = torch.arange(len(self.levels), device=self.levels.device) + first
        return first if torch.equal(self.levels, whole.float()) else None
