"""Folds what adapters have at one weight into it: accumulated in fp64, slice by slice, and rounded once.

A merged weight in fp64 is the sum itself, rounded once (:mod:`lora_fx.passes.merge.rounding`). A kind that
makes another weight of that sum rounds, too: that leaves a few units in the last place.
Trained rows of an embedding are written into it as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ir import PlannedSite, PlannedTokens, Record
from lora_fx.kinds import kind_of
from lora_fx.passes.merge.change import (
    add_change,
    exact_terms,
    sliced_factors,
    sums_over_rank,
    wide_factors,
)
from lora_fx.passes.merge.rounding import Term, round_into, rounding_memory, sum_exactly
from lora_fx.passes.parameters import factors_of, gathered, own_value, tokens_of

__all__ = [
    "Fold",
    "TokenFold",
    "Workspace",
    "cannot_overflow",
    "is_finite",
    "tied_tokens",
    "token_weights",
]


def cannot_overflow(
    model: nn.Module, rows: Sequence[tuple[PlannedSite, str]], dtype: torch.dtype
) -> bool:
    """Whether a weight that is finite stays so, whatever it holds; False if that is not known.

    ``|s (BA)_ij| ≤ |s| · r · max|A| · max|B|``, and less than half a unit in the last place of the largest
    number of a dtype rounds away when it is added to that number. What a kind makes of a weight it has to
    bound itself.

    Args:
        model: The rewritten model.
        rows: Sites of one weight, each with the name of its adapter.
        dtype: Of the merged weight.
    """
    largest, change = torch.finfo(dtype), 0.0
    for row, adapter in rows:
        kind, factors = kind_of(row), factors_of(model, row, adapter)
        if kind.low_rank:
            if not sums_over_rank(row):
                return False
            change += abs(row.scale) * row.rank * _largest(factors.a) * _largest(factors.b)
        if kind.transforms:
            bound = kind.bound({name: gathered(one) for name, one in factors.slots.items()})
            # What it makes of a weight has that bound only if nothing else is added to it.
            if bound is None or len(rows) > 1 or not bound <= largest.max / 2:
                return False
    # Half a unit is max · eps / 4; the rest is for the rounding of what is computed here.
    return change < largest.max * largest.eps / 8


def _largest(values: torch.Tensor) -> float:
    return max((abs(float(end)) for end in torch.aminmax(gathered(values))), default=0.0)


# Elements of a weight that are widened to fp64 at a time: what is done to them stays in a core's cache.
_CHUNK = 1 << 18


class Workspace:
    """Memory that all folds of a merge compute in, one after the other.

    What is new to the process takes longer to get than what is computed in it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for some numbers, with any values in it: the same one each time that a use is named."""
        key = (use, dtype, device)
        found = self._kept.get(key)
        if found is None or len(found) < count:
            found = self._kept[key] = torch.empty(count, dtype=dtype, device=device)
        return found[:count]


class _Part(NamedTuple):
    """What a site adds.

    Attributes:
        pair: A and ``s · B``; None without factors.
        values: The slots of a kind that makes another weight, by name.
        slices: A and ``s · B`` in slices whose products are exact; None where nothing is summed exactly.
    """

    pair: tuple[torch.Tensor, torch.Tensor] | None
    values: Mapping[str, torch.Tensor]
    slices: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def rows(self, first: int, last: int, *, experts: bool) -> _Part:
        """That of some output features, or experts."""
        sliced = self.slices
        if sliced is not None:
            a, b = sliced
            sliced = (
                [one[first:last] for one in a] if experts else a,
                [one[first:last] for one in b],
            )
        pair = self.pair
        if pair is not None:
            pair = (pair[0][first:last] if experts else pair[0], pair[1][first:last])
        values = {name: one[first:last] for name, one in self.values.items()}
        return _Part(pair, values, sliced)


class _Folded:
    """The changes that are folded into one weight."""

    rows: Any

    @property
    def name(self) -> str:
        """FQN of the first site."""
        return str(self.rows[0][0].name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapter of every site."""
        return tuple(adapter for _, adapter in self.rows)


@dataclasses.dataclass(frozen=True)
class Fold(_Folded):
    """Everything that is folded into one weight.

    Attributes:
        model: The rewritten model.
        record: Its record.
        rows: Sites of the weight, each with the name of its adapter.
        workspace: What it computes in.
    """

    model: nn.Module
    record: Record
    rows: tuple[tuple[PlannedSite, str], ...]
    workspace: Workspace = dataclasses.field(default_factory=Workspace, compare=False, repr=False)

    def check(self, old: torch.Tensor) -> None:
        """Finds what :meth:`fold_into` cannot undo; nothing of the weight's size is made.

        Raises:
            MergeError: If the merged weight overflows.
        """
        if not self._cannot_overflow(old.dtype):
            self._run(old, None)

    def folded(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged weight; no second weight in fp64 is made.

        Args:
            old: The weight before.
            dtype: Of the result; that of the old one by default.

        Raises:
            MergeError: If it overflows.
        """
        dtype, shape = dtype or old.dtype, self.rows[0][0].site.weight_shape
        merged = torch.empty(shape, dtype=dtype, device=old.device)
        wider = torch.finfo(dtype).max >= torch.finfo(old.dtype).max
        self._run(old, merged, checked=wider and self._cannot_overflow(dtype))
        return merged

    def fold_into(self, out: torch.Tensor) -> None:
        """Writes the merged weight over the old one, which :meth:`check` has passed.

        Args:
            out: The old weight, contiguous.
        """
        self._run(out, out, checked=True)

    def exact(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged weight in fp64.

        Args:
            old: The weight before.
            dtype: What it is compared with or stored in; that of the old one by default.
        """
        site = self.rows[0][0].site
        total = site.applied(old).to(torch.float64, copy=True)
        parts = self._parts(total.dtype, total.device, exactly=(dtype or old.dtype) is total.dtype)
        self._add(total, 0, parts)
        return site.stored(total)

    def _run(self, old: torch.Tensor, out: torch.Tensor | None, *, checked: bool = False) -> None:
        """Goes through the slices of a weight: each depends on the same slice of the old one only.

        Args:
            old: The weight before.
            out: Takes the merged weight; may be the old one. None if it is only checked.
            checked: Whether it is known not to overflow.
        """
        wide = torch.float32 if old.device.type == "mps" else torch.float64
        site = self.rows[0][0].site
        axis, old = site.axis, site.applied(old)
        features = old.shape[axis]
        step = features if site.groups > 1 else max(1, _CHUNK * features // max(1, old.numel()))
        step, size = min(step, features), old.numel() // max(1, features)
        device, take = old.device, self.workspace.take
        memory = take("sums", step * size, wide, device)
        dtype = old.dtype if out is None else out.dtype
        needed = rounding_memory(dtype, memory)
        scratch = take("rounding", needed, torch.float32, device) if needed else None
        rehearsed = take("rehearsal", 0 if out is not None else step * size, dtype, device)
        merged = out
        if out is not None:
            # Dimensions that are permuted and joined have memory of their own until they are put back.
            merged = out.view(old.shape) if site.order is None else out.new_empty(old.shape)
        parts = self._parts(wide, old.device, exactly=dtype is torch.float64)
        finite = True
        for start in range(0, features, step):
            source = old.narrow(axis, start, min(step, features - start))
            total = memory[: source.numel()].view(source.shape).copy_(source)
            self._add(total, start, parts)
            if merged is None:
                part = rehearsed[: source.numel()].view(source.shape)
            else:
                part = merged.narrow(axis, start, source.shape[axis])
            round_into(part, total, scratch)
            finite = finite and (checked or is_finite(part))
        if out is not None and merged is not None and site.order is not None:
            out.copy_(site.stored(merged))
        if not finite and is_finite(old):
            raise MergeError(
                f"{self.name}: the merged weight overflows {dtype}; merge in a wider dtype"
            )

    def _cannot_overflow(self, dtype: torch.dtype) -> bool:
        """Whether that is known without a look at the weight."""
        return not self._moved and cannot_overflow(self.model, self.rows, dtype)

    def _parts(
        self, dtype: torch.dtype, device: torch.device, *, exactly: bool = False
    ) -> list[_Part]:
        """What every site adds.

        Args:
            dtype: In which it is computed.
            device: Where.
            exactly: Whether sums are to be rounded once only.
        """
        parts: list[_Part] = []
        for row, adapter in self.rows:
            kind, pair, sliced = kind_of(row), None, None
            if kind.low_rank:
                pair = wide_factors(self.model, row, adapter, dtype, device)
                sliced = sliced_factors(self.model, row, adapter, device) if exactly else None
            slots = factors_of(self.model, row, adapter).slots if kind.transforms else {}
            values = {name: gathered(v).flatten().to(device, dtype) for name, v in slots.items()}
            parts.append(_Part(pair, values, sliced))
        return parts

    def _add(self, total: torch.Tensor, start: int, parts: list[_Part]) -> None:
        """Adds everything to a slice of the weight that begins at ``start``."""
        plain = self._plain
        if plain and all(part.slices is not None for part in parts):
            sum_exactly(total, lambda: self._terms(total, start, parts))
            return
        several = not plain and len(self.rows) > 1
        moved = self._moved
        before = total.clone() if several and len(moved) > 1 else total
        self._add_moves(total, start, moved)
        # What such a kind adds depends on the unadapted weight, whatever else is added to it.
        base = total.clone() if several else total
        for row, adapter, part, low, high in self._here(total, start, parts):
            seen = base
            if kind_of(row).transforms and adapter in moved and len(moved) > 1:
                # Never active together: each was trained on the base that its own start has left.
                seen = before.clone()
                self._add_moves(seen, start, (adapter,))
            here = (row.site.axis, low, high - low)
            add_change(
                total.narrow(*here),
                row,
                part.pair,
                part.values,
                seen.narrow(*here),
                part.slices,
            )

    def _here(
        self, total: torch.Tensor, start: int, parts: list[_Part]
    ) -> Iterator[tuple[PlannedSite, str, _Part, int, int]]:
        """The sites in a slice of the weight: what they add there, and where in the slice."""
        for (row, adapter), part in zip(self.rows, parts, strict=True):
            axis = row.site.axis
            first, last = row.site.rows or (0, row.site.applied_shape[axis])
            low, high = max(first, start), min(last, start + total.shape[axis])
            if low >= high:
                continue
            if row.site.groups == 1:
                part = part.rows(low - first, high - first, experts=row.site.experts is not None)
            yield row, adapter, part, low - start, high - start

    def _terms(self, total: torch.Tensor, start: int, parts: list[_Part]) -> Iterator[Term]:
        """Everything that is added to a slice of the weight, in terms that are exact."""
        site = self.rows[0][0].site
        for value, sign in self._moves(self._moved):
            moved = value.narrow(site.axis, start, total.shape[site.axis])
            yield Term(sign * moved.to(total))
        for row, _, part, low, high in self._here(total, start, parts):
            assert part.slices is not None
            shape = total.narrow(row.site.axis, low, high - low).shape
            for values in exact_terms(row, part.slices, shape):
                yield Term(values, row.site.axis, low)

    @functools.cached_property
    def _plain(self) -> bool:
        """Whether no kind makes another weight of the sum."""
        return not any(kind_of(row).transforms for row, _ in self.rows)

    @functools.cached_property
    def _moved(self) -> tuple[str, ...]:
        """The adapters whose initialization has changed the weight itself."""
        weight = self.rows[0][0].site.weight
        owners = dict.fromkeys(self.adapters)
        return tuple(name for name in owners if weight in self.record.adapters[name].own)

    def _add_moves(self, total: torch.Tensor, start: int, adapters: tuple[str, ...]) -> None:
        """Adds what initializations did to the weight itself."""
        site = self.rows[0][0].site
        for value, sign in self._moves(adapters):
            part = value.narrow(site.axis, start, total.shape[site.axis])
            total.add_(part.to(total), alpha=sign)

    def _moves(self, adapters: tuple[str, ...]) -> Iterator[tuple[torch.Tensor, int]]:
        """The weight as initializations have left it, and what to take off for each: the base's own."""
        site = self.rows[0][0].site
        for adapter in adapters:
            moved = gathered(own_value(self.model, adapter, site.weight))
            yield site.applied(moved), 1
            yield site.applied(gathered(self.record.originals[site.weight])), -1


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN, in one pass without a temporary.

    A minimum and a maximum take over what is not a number.
    """
    return not values.numel() or all(math.isfinite(end) for end in torch.aminmax(values))


_TokenWeight = list[tuple[PlannedTokens, str]]
"""Rows of one weight that are trained, and whose they are."""


@dataclasses.dataclass(frozen=True)
class TokenFold(_Folded):
    """All rows that are trained of one weight, used as :class:`lora_fx.passes.merge.fold.Fold` is.

    Attributes:
        model: The rewritten model.
        rows: The rows, each with the name of its adapter.
    """

    model: nn.Module
    rows: tuple[tuple[PlannedTokens, str], ...]

    def check(self, old: torch.Tensor) -> None:
        """Nothing can fail: :func:`token_weights` has looked at the values."""

    def folded(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of the weight with the rows in it, in another dtype if one is given."""
        merged = old.to(dtype or old.dtype, copy=True)
        self.fold_into(merged)
        return merged

    def fold_into(self, out: torch.Tensor) -> None:
        """Writes the rows into the weight."""
        for row, adapter in self.rows:
            _put_tokens(out, row, gathered(tokens_of(self.model, row, adapter)))

    def exact(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged weight in fp64, in whatever dtype it is stored."""
        return self.folded(old.double())


def token_weights(
    model: nn.Module, record: Record, names: Sequence[str]
) -> dict[str, _TokenWeight]:
    """The trained rows by weight.

    Args:
        model: A rewritten model.
        record: What it knows of itself.
        names: The adapters to merge.

    Raises:
        MergeError: If two of the adapters have the same row, one has rows of a weight that another one
            adapts, or a row is not finite.
    """
    found: dict[str, _TokenWeight] = {}
    for name in names:
        for row in record.adapters[name].tokens:
            found.setdefault(row.site.weight, []).append((row, name))
            if not torch.isfinite(gathered(tokens_of(model, row, name))).all():
                raise MergeError(
                    f"{row.name}: adapter {name!r} has rows that are not finite; nothing was merged"
                )
    for weight, several in found.items():
        indices = [index for row, _ in several for index in row.indices]
        if len(set(indices)) < len(indices):
            raise MergeError(
                f"several of the adapters have their own value of a row of {weight} "
                "(trainable_token_indices): merge one"
            )
    for name, place in _adapted(record, names):
        if place in found:
            raise MergeError(
                f"{found[place][0][1]!r} has rows of its own in {place} (trainable_token_indices), and "
                f"{name!r} adapts it: merge one"
            )
    return found


def tied_tokens(tokens: Mapping[str, _TokenWeight]) -> dict[str, str]:
    """Heads whose rows are those of an embedding, with the weight of that."""
    weights = {row.name: weight for weight, rows in tokens.items() for row, _ in rows}
    return {
        weight: weights[rows[0][0].tied]
        for weight, rows in tokens.items()
        if all(row.tied for row, _ in rows) and len(rows) == len(tokens[weights[rows[0][0].tied]])
    }


def _adapted(record: Record, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        for row in record.adapters[name].sites:
            yield name, row.site.weight


def _put_tokens(weight: torch.Tensor, row: PlannedTokens, rows: torch.Tensor) -> None:
    """Writes trained rows in their places into a weight, rounded to its dtype."""
    indices = torch.tensor(row.indices, device=weight.device)
    weight.index_copy_(0, indices, rows.detach().to(weight))
