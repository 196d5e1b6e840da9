"""Sums of products in fp64, rounded once: for weights that have all digits of fp64 themselves.

An fp64 accumulation of ``W + s·BA`` rounds at every step. Where the terms nearly cancel, thousands of units
in the last place of the result are lost. So A and ``s·B`` are taken apart into slices of so few bits that
every product of two slices is exact in fp64, whatever pattern computes it (Ozaki et al. 2012, "Error-free
transformations of matrix multiplication"). What is left is a sum of exact terms, which is accumulated in two
numbers an element and a bound of what those leave out. Where the bound does not decide which fp64 number is
the nearest, ``math.fsum`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

__all__ = ["Term", "slices_of", "sum_exactly", "two_products"]

# Digits of fp64.
_BITS = 53
# Below the first, products of two slices need not be exact; above the second, splitting may overflow.
_LEAST, _LARGEST = 2.0**-450, 2.0**450
# Dekker's constant: what halves the digits of a number.
_HALVES = 2.0**27 + 1


class Term(NamedTuple):
    """What is added to a part of a tensor.

    Attributes:
        values: Of the size of that part.
        axis, start: Where the part begins; it is as long as ``values`` along that axis.
    """

    values: torch.Tensor
    axis: int = 0
    start: int = 0

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that this is added to."""
        return whole.narrow(self.axis, self.start, self.values.shape[self.axis])


def two_products(values: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """``factor · values`` as two tensors whose sum it is, apart from underflow; one where that is exact."""
    product = values * factor
    if math.frexp(factor)[0] == 0.5:
        return [product]
    (high, low), (first, second) = _halved(values), _halved(values.new_tensor(factor))
    rest = ((high * first - product) + high * second + low * first) + low * second
    return [product, rest] if rest.any() else [product]


def slices_of(values: torch.Tensor, terms: int) -> list[torch.Tensor] | None:
    """Tensors whose sum is the one given, and of which two multiply exactly in fp64.

    Args:
        values: fp64.
        terms: The number of products that are added up to one element.

    Returns:
        The last one may have what is left below 2^-450, of which products are rounded. None if a number is
        too large to be taken apart.
    """
    bits = (_BITS - math.ceil(math.log2(max(1, terms)))) // 2
    rest, found = values.clone(), []
    while values.numel() and (largest := float(rest.abs().max())):
        if largest >= _LARGEST:
            return None
        if largest <= _LEAST:
            found.append(rest)
            break
        # Adding and subtracting this rounds to multiples of 2^(exponent - bits).
        exponent = math.frexp(largest)[1]
        ruler = 1.5 * 2.0 ** (exponent - bits + _BITS - 1)
        part = (rest + ruler) - ruler
        rest -= part
        found.append(part)
    return found


def sum_exactly(total: torch.Tensor, terms: Callable[[], Iterator[Term]]) -> None:
    """Adds terms to a tensor of fp64, each element rounded once: within half a unit in the last place.

    Args:
        total: What they are added to, in place.
        terms: Gives the terms, the same each time.
    """
    low, slack = torch.zeros_like(total), torch.zeros_like(total)
    high = total.clone()
    for term in terms():
        at_high, at_low, at_slack = (term.within(one) for one in (high, low, slack))
        error = _add(at_high, term.values)
        at_slack += _add(at_low, error).abs_()
    nearest = high.clone()
    rest = _add(nearest, low)
    # What the bound itself has lost in rounding.
    slack = slack * (1 + 2.0**-20) + rest.abs() * 2.0**-51 * (slack > 0)
    unsure = (slack > 0) & (
        (nearest + (rest + slack) != nearest) | (nearest + (rest - slack) != nearest)
    )
    finite = nearest.isfinite()
    nearest = torch.where(finite, nearest, high)
    places = (unsure & finite).nonzero(as_tuple=True)
    if len(places[0]):
        nearest[places] = _summed(total, terms, places)
    total.copy_(nearest)


def _summed(
    total: torch.Tensor, terms: Callable[[], Iterator[Term]], places: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The elements at some places, one by one."""
    columns = [total[places].tolist()]
    for term in terms():
        whole = torch.zeros_like(total)
        term.within(whole).copy_(term.values)
        columns.append(whole[places].tolist())
    return total.new_tensor([math.fsum(column) for column in zip(*columns, strict=True)])


def _add(total: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Adds in place, and returns what rounding has left out of each sum (Knuth's two-sum)."""
    before = total.clone()
    total += values
    seen = total - before
    return (before - (total - seen)) + (values - seen)


def _halved(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    turned = values * _HALVES
    high = turned - (turned - values)
    return high, values - high
