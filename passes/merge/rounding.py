"""Round merged weights once, measure the error against fp64, and report it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lora_fx.errors import some
from lora_fx.formats import ulp
from lora_fx.ir import html_block, html_lines, html_table, json_text

__all__ = [
    "MergeReport",
    "MergedSite",
    "OutputError",
    "Term",
    "round_into",
    "rounded",
    "rounding_memory",
    "slices_of",
    "sum_exactly",
    "two_products",
    "ulp",
]

# Bits of an fp64 significand.
_BITS = 53
# Below the first, products of two slices need not be exact; above the second, splitting may overflow.
_LEAST, _LARGEST = 2.0**-450, 2.0**450
# Dekker's constant, which splits a number into two halves of its digits.
_HALVES = 2.0**27 + 1


class Term(NamedTuple):
    """Values to add to a part of a tensor, in an exact sum.

    Attributes:
        values: The values to add, of the size of that part.
        axis, start: The start of the part; it is as long as ``values`` along that axis.
    """

    values: torch.Tensor
    axis: int = 0
    start: int = 0

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor to which the values are added."""
        return whole.narrow(self.axis, self.start, self.values.shape[self.axis])


def two_products(values: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """Return two tensors whose sum is exactly ``factor · values``, unless an element underflows.

    Return only one tensor if the product is exact.
    """
    product = values * factor
    if math.frexp(factor)[0] == 0.5:
        return [product]
    (high, low), (first, second) = _halved(values), _halved(values.new_tensor(factor))
    error = ((high * first - product) + high * second + low * first) + low * second
    return [product, error] if error.any() else [product]


def slices_of(values: torch.Tensor, terms: int) -> list[torch.Tensor] | None:
    """Split a tensor into a sum of tensors with few digits, whose products with each other are exact in fp64.

    Args:
        values: fp64.
        terms: The number of products that are added up to one element.

    Returns:
        The tensors. The last one may have a remainder below 2^-450, whose products are rounded. None if a
        number is too large to be split.
    """
    bits = (_BITS - math.ceil(math.log2(max(1, terms)))) // 2
    remainder, slices = values.clone(), []
    while values.numel() and (largest := float(remainder.abs().max())):
        if largest >= _LARGEST:
            return None
        if largest <= _LEAST:
            slices.append(remainder)
            break
        # Adding and subtracting the ruler rounds to multiples of 2^(exponent - bits).
        exponent = math.frexp(largest)[1]
        ruler = 1.5 * 2.0 ** (exponent - bits + _BITS - 1)
        part = (remainder + ruler) - ruler
        remainder -= part
        slices.append(part)
    return slices


def sum_exactly(total: torch.Tensor, terms: Callable[[], Iterator[Term]]) -> None:
    """Add terms to an fp64 tensor, so that each element is the exact sum rounded once.

    The error is at most half a unit in the last place.

    Args:
        total: The tensor, which is changed in place.
        terms: Returns the terms, the same each time.
    """
    low, slack = torch.zeros_like(total), torch.zeros_like(total)
    high = total.clone()
    for term in terms():
        at_high, at_low, at_slack = (term.within(whole) for whole in (high, low, slack))
        error = _add(at_high, term.values)
        at_slack += _add(at_low, error).abs_()
    nearest = high.clone()
    remainder = _add(nearest, low)
    # Add the rounding error of the bound itself.
    slack = slack * (1 + 2.0**-20) + remainder.abs() * 2.0**-51 * (slack > 0)
    unsure = (slack > 0) & (
        (nearest + (remainder + slack) != nearest) | (nearest + (remainder - slack) != nearest)
    )
    finite = nearest.isfinite()
    nearest = torch.where(finite, nearest, high)
    indices = (unsure & finite).nonzero(as_tuple=True)
    if len(indices[0]):
        nearest[indices] = _summed(total, terms, indices)
    total.copy_(nearest)


def _summed(
    total: torch.Tensor, terms: Callable[[], Iterator[Term]], indices: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the exact sums for the elements at some indices, computed one by one in Python."""
    columns = [total[indices].tolist()]
    for term in terms():
        whole = torch.zeros_like(total)
        term.within(whole).copy_(term.values)
        columns.append(whole[indices].tolist())
    return total.new_tensor([math.fsum(column) for column in zip(*columns, strict=True)])


def _add(total: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add ``values`` to a tensor in place, and return the rounding error of each sum (Knuth's two-sum)."""
    before = total.clone()
    total += values
    seen = total - before
    return (before - (total - seen)) + (values - seen)


def _halved(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    turned = values * _HALVES
    high = turned - (turned - values)
    return high, values - high


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp64 values rounded once to a dtype; see :func:`round_into`."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    round_into(result, values)
    return result


def round_into(
    result: torch.Tensor, values: torch.Tensor, scratch: torch.Tensor | None = None
) -> None:
    """Write fp64 values into a tensor of any floating-point dtype, rounded once.

    PyTorch casts fp64 to a half type by way of fp32, which would round twice.

    A value lies between the two neighbors of its fp32 rounding. If both neighbors round to the same number,
    so does the value. The few others are close to half-way between two numbers, and are rounded to odd in
    fp32 first.

    Args:
        result: The tensor to write.
        values: The values, of the same shape.
        scratch: As many fp32 numbers as :func:`rounding_memory` returns, for callers that round many slices:
            allocating memory takes longer than the rounding itself.
    """
    needed = rounding_memory(result.dtype, values)
    if not needed or not values.numel():
        result.copy_(values)
        return
    if scratch is None:
        scratch = torch.empty(needed, dtype=torch.float32, device=values.device)
    size, values = values.numel(), values.reshape(-1)
    near, neighbors = scratch[:size], scratch[size : 2 * size].view(result.dtype)
    low, high = neighbors[:size], neighbors[size:]
    bits = near.copy_(values).view(torch.int32)
    low.copy_(bits.sub_(1).view(torch.float32))
    high.copy_(bits.add_(2).view(torch.float32))
    # Compare numbers by their bits, several at a time if the size allows it.
    word = torch.int64 if size % 4 == 0 else torch.int16
    words = low.view(word)
    unsure = torch.ne(words, high.view(word)).nonzero().squeeze(1)
    if len(unsure):
        groups = values.view(len(words), -1)[unsure]
        words[unsure] = _by_odd(groups).to(result.dtype).view(word).squeeze(1)
    result.copy_(low.view(result.shape))


def rounding_memory(dtype: torch.dtype, values: torch.Tensor) -> int:
    """Return how many fp32 numbers :func:`round_into` needs: two for a value, or none.

    Args:
        dtype: The dtype to round to.
        values: The values, or as many as are rounded at a time.
    """
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return 0
    return 2 * values.numel()


def _by_odd(values: torch.Tensor) -> torch.Tensor:
    """Round fp64 to fp32 so that a second rounding, to a half type, gives the correct result.

    This is rounding to odd: Boldo and Melquiond, "When double rounding is odd", 2005.
    """
    near = values.float()
    gap = values - near.double()
    even = (near.view(torch.int32) & 1) == 0
    other = torch.nextafter(near, torch.where(gap > 0, torch.inf, -torch.inf).float())
    return torch.where(even & (gap != 0) & near.isfinite(), other, near)


@dataclasses.dataclass(frozen=True, slots=True)
class MergedSite:
    """One weight of a merge report: what rounding has left of the adapters' change.

    Attributes:
        name: FQN of the site.
        adapters: The folded adapters.
        max_ulp: Largest error of a merged element against fp64, in units in the last place of the weight's
            dtype. A correctly rounded weight has at most 0.5. NaN if it was not measured, or not rounded to
            nearest.
        relative_change: ``‖ΔW‖ / ‖W‖``; NaN if it was not measured.
        requantization_error: ``‖Q(W') - W'‖ / ‖W'‖`` for a weight that was quantized again, with W' the
            exact merged weight; NaN for any other. If it is not below ``relative_change``, quantizing has
            lost what the adapter learned.
        kept: The share of the change that is left after rounding, ``⟨Ŵ - W, ΔW⟩ / ‖ΔW‖²``. 0 means that the
            stored weight Ŵ has nothing of the change. It is an average, so single entries may be wrong even
            if it is near 1.
        moved: The share of the entries whose stored value changed.
        output_error: ``‖(Ŵ - W - ΔW) x‖ / ‖ΔW x‖`` over the inputs of the site; NaN if none were given.
        change: ``‖ΔW‖``.
        rounding: ``nearest``, ``compensated`` or ``stochastic``.
        deployed: The storage that the adapter was trained for, in which the weight is stored. The error of
            quantizing was then part of training. Empty if the adapter was not trained for one.
    """

    name: str
    adapters: tuple[str, ...]
    max_ulp: float
    relative_change: float
    requantization_error: float = math.nan
    kept: float = math.nan
    moved: float = math.nan
    output_error: float = math.nan
    change: float = math.nan
    rounding: str = "nearest"
    deployed: str = ""

    def __eq__(self, other: object) -> bool:
        """Return True if all numbers are the same. NaN is equal to NaN, in all versions of Python."""
        if not isinstance(other, MergedSite):
            return NotImplemented
        return dataclasses.astuple(self) == dataclasses.astuple(other)

    def __hash__(self) -> int:
        return hash(dataclasses.astuple(self))

    @property
    def requantized(self) -> bool:
        """True if the weight was quantized again."""
        return not math.isnan(self.requantization_error)


@dataclasses.dataclass(frozen=True, slots=True)
class OutputError:
    """The effect of rounding on the outputs of a model for example inputs.

    The models are in evaluation mode, and all floating-point outputs count. Each model computes in its own
    dtypes. In half precision that rounds activations, too.

    Attributes:
        relative_error: ``‖y_q - y‖ / ‖y‖``, with y of the adapted model and y_q of the merged one.
        largest: ``max |y_q - y|``.
        relative_change: ``‖y - y_0‖ / ‖y‖``, with y_0 of the base: the effect of the adapters.
    """

    relative_error: float
    largest: float
    relative_change: float

    def __str__(self) -> str:
        return (
            f"outputs: off by {self.relative_error:.2e} of their norm after the merge (a single value by at "
            f"most {self.largest:.2e}), where the adapters change them by {self.relative_change:.2e}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class MergeReport:
    """The result of a merge. Print it for a line for each weight; a notebook shows a table that sorts.

    Attributes:
        sites: One row for each weight.
        untied: FQNs that shared their storage with another parameter before the merge, but not after it.
        outputs: The effect of rounding on the outputs; None if that was not measured.
        shared: FQNs of the frozen parameters that are shared with the model before the rewrite.
        left_out: Names of the model's adapters that were not merged.
    """

    sites: tuple[MergedSite, ...]
    untied: tuple[str, ...] = ()
    outputs: OutputError | None = None
    shared: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def max_ulp(self) -> float:
        """The largest error of a weight that was not quantized again, in units in the last place.

        NaN if an error was not measured.
        """
        errors = [site.max_ulp for site in self.sites if not site.requantized]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)

    @property
    def _is_nearest(self) -> bool:
        return all(site.rounding == "nearest" for site in self.sites)

    @property
    def requantization_error(self) -> float:
        """The largest relative error of a weight that was quantized again; NaN if no weight was."""
        errors = [site.requantization_error for site in self.sites if site.requantized]
        return max(errors, default=math.nan)

    @property
    def kept(self) -> float:
        """The share of all changes that is left after rounding; NaN if nothing was changed."""
        sizes = [(site.change**2, site.kept) for site in self.sites if not math.isnan(site.kept)]
        total = sum(size for size, _ in sizes)
        return sum(size * kept for size, kept in sizes) / total if total else math.nan

    @property
    def moved(self) -> float:
        """The mean share of a weight's entries that changed; NaN if that was not measured."""
        shares = [site.moved for site in self.sites if not math.isnan(site.moved)]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def output_error(self) -> float:
        """The mean error of a site's output relative to the effect of its adapter; NaN without inputs."""
        errors = [site.output_error for site in self.sites if not math.isnan(site.output_error)]
        return sum(errors) / len(errors) if errors else math.nan

    def to_json(self) -> str:
        """Return the report as JSON text; values that were not measured are null."""
        return json_text(self)

    def __repr__(self) -> str:
        return f"<MergeReport: {self.summary}; print it for each weight>"

    def _repr_html_(self) -> str:
        columns = (
            "weight",
            "adapters",
            "error (ulp)",
            "changed by",
            "lost by quantizing again",
            "kept",
            "moved",
            "output error",
        )
        rows = [
            (
                site.name,
                ", ".join(site.adapters),
                *(
                    "" if math.isnan(x) else f"{x:.4g}"
                    for x in (site.max_ulp, site.relative_change)
                ),
                f"{site.requantization_error:.2e}" if site.requantized else "",
                *(
                    "" if math.isnan(x) else f"{x:.3g}"
                    for x in (site.kept, site.moved, site.output_error)
                ),
            )
            for site in self.sites
        ]
        lines = [self.summary, *([] if self.outputs is None else [str(self.outputs)])]
        lines += [f"untied: {name}" for name in self.untied]
        table = html_table(columns, rows, left=2)
        return f"<div>{html_lines(lines)}{html_block(f'weights ({len(rows)})', table)}</div>"

    @property
    def summary(self) -> str:
        """The result in one line."""
        again = [site for site in self.sites if site.requantized and not site.deployed]
        trained = [site for site in self.sites if site.deployed]
        parts = [f"{len(self.sites)} weight(s) merged"]
        if not self._is_nearest:
            ways = dict.fromkeys(site.rounding for site in self.sites)
            parts.append(f"rounded {' and '.join(ways)}")
        elif not math.isnan(self.max_ulp) and (
            len(again) + len(trained) < len(self.sites) or not self.sites
        ):
            parts.append(f"largest error {self.max_ulp:.4f} units in the last place")
        if again:
            worst = max(site.requantization_error for site in again)
            parts.append(f"{len(again)} quantized again, largest error {worst:.2e} of the weight")
        if not math.isnan(self.kept):
            parts.append(f"{100 * self.kept:.3g} % of the change kept")
        if not math.isnan(self.output_error):
            parts.append(f"outputs off by {100 * self.output_error:.3g} % of the adapters' effect")
        if trained:
            names = ", ".join(dict.fromkeys(site.deployed for site in trained))
            parts.append(f"{len(trained)} stored as {names}, for which they were trained")
        if self.left_out:
            parts.append(f"without {some(list(map(repr, self.left_out)))}")
        return ", ".join(parts)

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [] if self.outputs is None else [str(self.outputs)]
        lines += [_line(site) for site in self.sites]
        lines += [f"  untied: {name}" for name in self.untied]
        if self.shared:
            lines.append(
                f"{len(self.shared)} parameter(s) shared with the base, and frozen: own=True copies them"
            )
        return "\n".join(lines)


def _line(site: MergedSite) -> str:
    error = [] if math.isnan(site.max_ulp) else [f"{site.max_ulp:.4f} ulp"]
    if site.deployed:
        error = [f"{site.deployed}, as it was trained"]
    elif site.requantized:
        error = [f"{site.requantization_error:.2e} lost by quantizing again"]
    if site.rounding != "nearest":
        error = [*error, site.rounding]
    if math.isnan(site.relative_change):
        return f"  {site.name}"
    parts = [*error, f"changed by {100 * site.relative_change:.3g} % of its norm"]
    if not math.isnan(site.kept):
        parts.append(
            f"{100 * site.kept:.3g} % of it kept, {100 * site.moved:.3g} % of entries moved"
        )
    if not math.isnan(site.output_error):
        parts.append(f"output off by {100 * site.output_error:.3g} % of the effect")
    return f"  {site.name}: {', '.join(parts)}"
