"""Fold the changes of adapters into weights and biases: accumulated in fp64, by slices, rounded once.

A merged weight in fp64 is the exact sum, rounded once (:mod:`lora_fx.passes.merge.rounding`). If the adapter
kind transforms that sum, by a magnitude for example, its arithmetic adds an error of a few units in the last
place. Trained rows of an embedding are copied into the weight unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_fx import torch_private
from lora_fx.errors import MergeError
from lora_fx.ir import PlannedSite, PlannedTokens, Record
from lora_fx.kinds import kind_of, refusal, stores_product
from lora_fx.passes.merge.rounding import (
    Term,
    round_into,
    rounded,
    rounding_memory,
    slices_of,
    sum_exactly,
    two_products,
)
from lora_fx.passes.merge.survival import Slice
from lora_fx.passes.parameters import (
    factors_of,
    gathered,
    is_computed,
    own_value,
    tokens_of,
    weight_at,
)
from lora_fx.passes.patterns import EmbeddingPattern, LinearPattern, pattern_of

__all__ = [
    "Fold",
    "TokenFold",
    "TokenWeight",
    "Workspace",
    "cannot_overflow",
    "check_mergeable",
    "check_stored",
    "delta_weight",
    "is_finite",
    "merged_biases",
    "tied_tokens",
    "token_weights",
]


# Patterns may override delta: these are the plain products.
_PRODUCTS = (LinearPattern.delta, EmbeddingPattern.delta)
_OURS = "lora_fx.passes.patterns."


def delta_weight(
    model: nn.Module, row: PlannedSite, adapter: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``s · B A`` of one site, in the layout of the weight. For an additive kind, that is ΔW.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        dtype: The dtype of the computation.
    """
    a, b = _wide_factors(model, row, adapter, dtype)
    return pattern_of(row.site).delta(row.site, a, b)


def _wide_factors(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and ``s · B`` of a site in another dtype, usually a wider one.

    B is scaled because it has fewer elements than the product.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        dtype: The dtype of the result.
        device: The device of the result; by default that of the factors.
    """
    a, b = _pair(model, row, adapter, device, dtype)
    return a, b * row.scale


def _pair(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    device: torch.device | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a site, in the shapes that the site's pattern reads.

    A head tied to an embedding stores them transposed.

    Raises:
        MergeError: If no weight has the effect of the adapter.
    """
    kind = kind_of(row)
    if kind.dynamic:
        raise MergeError(f"{row.name}: adapter {adapter!r}: {refusal(kind)}")
    factors = factors_of(model, row, adapter)
    a, b = (gathered(factor).to(device, dtype) for factor in factors.pair)
    slots = {name: gathered(slot).to(device, dtype) for name, slot in factors.slots.items()}
    a, b = (a.T, b.T) if row.tied else (a, b)
    try:
        return kind.merged_factors(row.site, a, b, kind.values(row.site, slots))
    except MergeError as error:
        raise MergeError(f"{row.name}: adapter {adapter!r}: {error}") from error


def check_mergeable(model: nn.Module, row: PlannedSite, adapter: str) -> None:
    """Raise if no weight has the effect of an adapter at a site.

    Raises:
        MergeError: With the reason, and a remedy.
    """
    kind = kind_of(row)
    if kind.dynamic or (kind.low_rank and not stores_product(kind)):
        _pair(model, row, adapter, None, torch.float32)


def _sums_over_rank(row: PlannedSite) -> bool:
    """Return True if each element of ΔW is known to be a sum over the rank, which exact summation needs.

    This holds for the patterns of this package.
    """
    return type(pattern_of(row.site)).delta.__module__.startswith(_OURS)


_Slices = tuple[list[torch.Tensor], list[torch.Tensor]]


def _sliced_factors(
    model: nn.Module, row: PlannedSite, adapter: str, device: torch.device
) -> _Slices | None:
    """Return A and ``s · B`` in fp64, as slices whose products are exact.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter's name.
        device: The device of the result.

    Returns:
        The slices of A and of ``s · B``. None if numbers are too large to be sliced, or if a pattern from
        another package computes ΔW.
    """
    if not _sums_over_rank(row):
        return None
    a, b = _pair(model, row, adapter, device, torch.float64)
    down, up = slices_of(a, row.rank), list[torch.Tensor]()
    for part in two_products(b, row.scale):
        slices = slices_of(part, row.rank)
        if down is None or slices is None:
            return None
        up += slices
    return None if down is None else (down, up)


def _exact_terms(row: PlannedSite, slices: _Slices, shape: torch.Size) -> Iterator[torch.Tensor]:
    """Yield tensors whose sum is ``s · BA``: the exact products of slices of A and of ``s · B``.

    Args:
        row: The site.
        slices: Slices of A and ``s · B``, for a part of the weight.
        shape: The shape of that part.
    """
    pattern = pattern_of(row.site)
    for a in slices[0]:
        for b in slices[1]:
            yield pattern.delta(row.site, a, b).reshape(shape)


def _add_change(
    total: torch.Tensor,
    row: PlannedSite,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    values: Mapping[str, torch.Tensor],
    base: torch.Tensor,
    slices: _Slices | None = None,
) -> None:
    """Add one site's change ``ΔW`` to a part of the weight.

    The change is ``s·BA``. For a kind that transforms the weight, it is the transform of ``W + s·BA`` minus
    W.

    Args:
        total: The part of the weight, in the dtype of the computation. It is changed in place.
        row: The site.
        pair: A and ``s · B`` for that part; None without factors.
        values: The slots of the kind for that part.
        base: That part of the unadapted weight, for a kind that transforms it.
        slices: Slices of A and ``s · B`` for that part, if ``W + s·BA`` is to be rounded once.
    """
    pattern, site, kind = pattern_of(row.site), row.site, kind_of(row)
    if not kind.transforms:
        assert pair is not None
        a, b = pair
        if type(pattern).delta in _PRODUCTS:
            # In place: allocating a product each time would take longer than computing it.
            transposed = type(pattern).delta is EmbeddingPattern.delta or site.layout != "out_in"
            (total.mT if transposed else total).addmm_(b, a)
            return
        total.add_(pattern.delta(site, a, b).reshape(total.shape))
        return
    adapted = base.clone()
    if pair is not None and slices is None:
        adapted += pattern.delta(site, *pair).reshape(total.shape)
    elif slices is not None:
        shape = adapted.shape
        sum_exactly(adapted, lambda: (Term(values) for values in _exact_terms(row, slices, shape)))
    adapted = kind.transformed(adapted, site, values)
    # Overwriting the weight avoids the rounding error of a difference.
    if total.data_ptr() == base.data_ptr():
        total.copy_(adapted)
    else:
        total.add_(adapted - base)


def cannot_overflow(
    model: nn.Module, rows: Sequence[tuple[PlannedSite, str]], dtype: torch.dtype
) -> bool:
    """Return True if no finite weight can overflow in a merge of these sites; False if that is unknown.

    ``|s (BA)_ij| ≤ |s| · r · max|A| · max|B|``. A change of less than half a unit in the last place of a
    dtype's largest number rounds away when it is added to that number. A kind that transforms the weight
    must provide its own bound.

    Args:
        model: The rewritten model.
        rows: Sites of one weight, each with the name of its adapter.
        dtype: The dtype of the merged weight.
    """
    largest, change = torch.finfo(dtype), 0.0
    for row, adapter in rows:
        kind, factors = kind_of(row), factors_of(model, row, adapter)
        if kind.low_rank:
            if not _sums_over_rank(row):
                return False
            a, b = _pair(model, row, adapter, None, factors.a.dtype)
            change += abs(row.scale) * row.rank * _largest(a) * _largest(b)
        if kind.transforms:
            bound = kind.bound({name: gathered(slot) for name, slot in factors.slots.items()})
            # The bound holds only if nothing else is added to the transformed weight.
            if bound is None or len(rows) > 1 or not bound <= largest.max / 2:
                return False
    # Half a unit is max · eps / 4. Only half of it is allowed, because this computation rounds, too.
    return change < largest.max * largest.eps / 8


def _largest(values: torch.Tensor) -> float:
    return max((abs(float(end)) for end in torch.aminmax(gathered(values))), default=0.0)


# Elements of a weight that are widened to fp64 at a time: few enough to stay in a core's cache.
_CHUNK = 1 << 18
# Number of parts of a weight from which a sample of its entries is taken.
_PARTS = 4


class Workspace:
    """Memory that the folds of a merge reuse, one fold after the other.

    Allocating new memory takes longer than the computation in it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return uninitialized memory for ``count`` numbers. Calls with equal ``use`` share memory."""
        key = (use, dtype, device)
        memory = self._kept.get(key)
        if memory is None or len(memory) < count:
            memory = self._kept[key] = torch.empty(count, dtype=dtype, device=device)
        return memory[:count]


class _Part(NamedTuple):
    """The change of one site, or of some of its output features, in the dtype of the computation.

    Attributes:
        pair: A and ``s · B``; None without factors.
        values: The slots of a kind that transforms the weight, by name.
        sliced: The names of the slots that have a value for each output feature.
        slices: A and ``s · B`` in slices whose products are exact; None if nothing is summed exactly.
    """

    pair: tuple[torch.Tensor, torch.Tensor] | None
    values: Mapping[str, torch.Tensor]
    slices: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    sliced: frozenset[str] = frozenset()

    def rows(self, first: int, last: int, *, experts: bool) -> _Part:
        """Return the change for a range of output features, or of experts."""
        sliced = self.slices
        if sliced is not None:
            a, b = sliced
            sliced = (
                [part[first:last] for part in a] if experts else a,
                [part[first:last] for part in b],
            )
        pair = self.pair
        if pair is not None:
            pair = (pair[0][first:last] if experts else pair[0], pair[1][first:last])
        values = {
            name: slot[first:last] if name in self.sliced else slot
            for name, slot in self.values.items()
        }
        return _Part(pair, values, sliced, self.sliced)


class _Folded:
    """Base class for the changes that are folded into one weight, with their sites and adapters."""

    rows: Any

    @property
    def name(self) -> str:
        """FQN of the first site."""
        return str(self.rows[0][0].name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapter of every site."""
        return tuple(adapter for _, adapter in self.rows)

    @property
    def sites(self) -> tuple[Any, ...]:
        """The planned sites, without the names of their adapters."""
        return tuple(row for row, _ in self.rows)


@dataclasses.dataclass(frozen=True)
class Fold(_Folded):
    """All changes that are folded into one weight.

    Attributes:
        model: The rewritten model.
        record: Its record.
        rows: Sites of the weight, each with the name of its adapter.
        workspace: The memory for its computation.
    """

    model: nn.Module
    record: Record
    rows: tuple[tuple[PlannedSite, str], ...]
    workspace: Workspace = dataclasses.field(default_factory=Workspace, compare=False, repr=False)

    def check(self, old: torch.Tensor) -> None:
        """Raise if the merged weight overflows, before :meth:`fold_into` overwrites the old weight.

        :meth:`fold_into` could not restore the part that it has overwritten.

        This needs no memory of the weight's size.

        Raises:
            MergeError: If the merged weight overflows.
        """
        if not self._cannot_overflow(old.dtype):
            self._run(old, None)

    def folded(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the merged weight as a new tensor. Only a slice of it is in fp64 at a time.

        Args:
            old: The weight before.
            dtype: The dtype of the result; that of the old one by default.

        Raises:
            MergeError: If it overflows.
        """
        dtype, shape = dtype or old.dtype, self.rows[0][0].site.weight_shape
        merged = torch.empty(shape, dtype=dtype, device=old.device)
        wider = torch.finfo(dtype).max >= torch.finfo(old.dtype).max
        self._run(old, merged, checked=wider and self._cannot_overflow(dtype))
        return merged

    def fold_into(self, out: torch.Tensor) -> None:
        """Overwrite the old weight, which :meth:`check` has accepted, with the merged one.

        Args:
            out: The old weight, contiguous.
        """
        self._run(out, out, checked=True)

    def exact(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the merged weight in fp64.

        Args:
            old: The weight before.
            dtype: The dtype in which it will be compared or stored; that of the old one by default.
        """
        site = self.rows[0][0].site
        total = site.applied(old).to(torch.float64, copy=True)
        parts = self._parts(total.dtype, total.device, exactly=(dtype or old.dtype) is total.dtype)
        self._add(total, 0, parts)
        return site.stored(total)

    def slices(
        self, old: torch.Tensor, dtype: torch.dtype, entries: int | None = None
    ) -> Iterator[Slice]:
        """Yield slices of the weight, each with the values before the merge and the exact sums.

        Args:
            old: The weight before.
            dtype: The dtype in which it will be compared.
            entries: About how many entries the slices have together, spread over the weight; None for all.
        """
        site = self.rows[0][0].site
        axis, applied = site.axis, site.applied(old)
        features = applied.shape[axis]
        each = max(1, old.numel() // max(1, features))
        size = features if site.groups > 1 else max(1, min(features, _CHUNK // each))
        starts = range(0, features, size)
        if entries is not None and entries < old.numel() and site.groups == 1:
            size = max(1, entries // each // _PARTS)
            starts = range(0, features - size + 1, max(1, (features - size) // (_PARTS - 1)))
        wide = torch.float32 if old.device.type == "mps" else torch.float64
        parts = self._parts(wide, old.device, exactly=dtype is torch.float64)
        for start in starts:
            length = min(size, features - start)
            before = applied.narrow(axis, start, length).to(wide, copy=True)
            exact = before.clone()
            self._add(exact, start, parts)
            yield Slice(axis, start, before, exact)

    def _run(self, old: torch.Tensor, out: torch.Tensor | None, *, checked: bool = False) -> None:
        """Fold a weight slice by slice: each slice depends only on the same slice of the old weight.

        Args:
            old: The weight before.
            out: The tensor to write the merged weight to; may be the old weight. None to check only.
            checked: True if the merged weight is known not to overflow.
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
            # Permuted and joined dimensions need separate memory until they are permuted back.
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
        """Return True if the factors alone show that the merged weight cannot overflow.

        The weight itself is not read.
        """
        return not self._moved and cannot_overflow(self.model, self.rows, dtype)

    def _parts(
        self, dtype: torch.dtype, device: torch.device, *, exactly: bool = False
    ) -> list[_Part]:
        """Return the change of every site.

        Args:
            dtype: The dtype of the computation.
            device: Its device.
            exactly: True to round sums only once.
        """
        parts: list[_Part] = []
        for row, adapter in self.rows:
            kind, pair, sliced = kind_of(row), None, None
            if kind.low_rank:
                pair = _wide_factors(self.model, row, adapter, dtype, device)
                sliced = _sliced_factors(self.model, row, adapter, device) if exactly else None
            slots = factors_of(self.model, row, adapter).slots if kind.transforms else {}
            slots = {name: gathered(slot).to(device, dtype) for name, slot in slots.items()}
            over = frozenset(slot.name for slot in kind.slots(row.site) if slot.over_outputs)
            parts.append(_Part(pair, kind.values(row.site, slots), sliced, over))
        return parts

    def _add(self, total: torch.Tensor, start: int, parts: list[_Part]) -> None:
        """Add the changes of all sites to a slice of the weight that begins at ``start``."""
        plain = self._plain
        if plain and all(part.slices is not None for part in parts):
            sum_exactly(total, lambda: self._terms(total, start, parts))
            return
        several = not plain and len(self.rows) > 1
        moved = self._moved
        before = total.clone() if several and len(moved) > 1 else total
        self._add_moves(total, start, moved)
        # The change of a transforming kind depends on the unadapted weight, not on other changes.
        base = total.clone() if several else total
        for row, adapter, part, low, high in self._sites_in_slice(total, start, parts):
            seen = base
            if kind_of(row).transforms and adapter in moved and len(moved) > 1:
                # These adapters are never active together. Each was trained on the base that its own
                # initialization has left.
                seen = before.clone()
                self._add_moves(seen, start, (adapter,))
            window = (row.site.axis, low, high - low)
            _add_change(
                total.narrow(*window),
                row,
                part.pair,
                part.values,
                seen.narrow(*window),
                part.slices,
            )

    def _sites_in_slice(
        self, total: torch.Tensor, start: int, parts: list[_Part]
    ) -> Iterator[tuple[PlannedSite, str, _Part, int, int]]:
        """Yield each site that has output features in a slice of the weight.

        Each comes with its adapter, its change to the slice, and its range of output features in the slice.
        """
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
        """Yield all changes to a slice of the weight, as terms for :func:`sum_exactly`."""
        site = self.rows[0][0].site
        for value, sign in self._changes_by_starts(self._moved):
            moved = value.narrow(site.axis, start, total.shape[site.axis])
            yield Term(sign * moved.to(total))
        for row, _, part, low, high in self._sites_in_slice(total, start, parts):
            assert part.slices is not None
            shape = total.narrow(row.site.axis, low, high - low).shape
            for values in _exact_terms(row, part.slices, shape):
                yield Term(values, row.site.axis, low)

    @functools.cached_property
    def _plain(self) -> bool:
        """True if every change is a sum, because no kind transforms the weight."""
        return not any(kind_of(row).transforms for row, _ in self.rows)

    @functools.cached_property
    def _moved(self) -> tuple[str, ...]:
        """The adapters whose initialization has changed the weight itself."""
        weight = self.rows[0][0].site.weight
        owners = dict.fromkeys(self.adapters)
        return tuple(name for name in owners if weight in self.record.adapters[name].own)

    def _add_moves(self, total: torch.Tensor, start: int, adapters: tuple[str, ...]) -> None:
        """Add to a slice of the weight the changes that the initializations of some adapters made to it."""
        site = self.rows[0][0].site
        for value, sign in self._changes_by_starts(adapters):
            part = value.narrow(site.axis, start, total.shape[site.axis])
            total.add_(part.to(total), alpha=sign)

    def _changes_by_starts(self, adapters: tuple[str, ...]) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield tensors with signs, whose signed sum is the change that initializations made to the weight.

        These are the weight that an initialization has left (1), and the base's own weight (-1).
        """
        site = self.rows[0][0].site
        for adapter in adapters:
            moved = gathered(own_value(self.model, adapter, site.weight))
            yield site.applied(moved), 1
            yield site.applied(gathered(self.record.originals[site.weight])), -1


def is_finite(values: torch.Tensor) -> bool:
    """Return True if no element is infinite or NaN, in one pass without a temporary.

    A minimum and a maximum propagate NaN.
    """
    return not values.numel() or all(math.isfinite(end) for end in torch.aminmax(values))


TokenWeight = list[tuple[PlannedTokens, str]]
"""Trained rows of one weight, each with the name of its adapter."""


@dataclasses.dataclass(frozen=True)
class TokenFold(_Folded):
    """All trained rows of one weight, with the interface of :class:`lora_fx.passes.merge.fold.Fold`.

    Attributes:
        model: The rewritten model.
        rows: The rows, each with the name of its adapter.
    """

    model: nn.Module
    rows: tuple[tuple[PlannedTokens, str], ...]

    def check(self, old: torch.Tensor) -> None:
        """Do nothing: :func:`token_weights` has checked the values."""

    def folded(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a copy of the weight with the trained rows in it, optionally in another dtype."""
        merged = old.to(dtype or old.dtype, copy=True)
        self.fold_into(merged)
        return merged

    def fold_into(self, out: torch.Tensor) -> None:
        """Write the trained rows into the weight."""
        for row, adapter in self.rows:
            _put_tokens(out, row, gathered(tokens_of(self.model, row, adapter)))

    def exact(self, old: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the merged weight in fp64."""
        return self.folded(old.double())

    def slices(
        self, old: torch.Tensor, dtype: torch.dtype, entries: int | None = None
    ) -> Iterator[Slice]:
        """Yield the whole weight, before and after the merge, in fp64.

        Yield nothing if ``entries`` asks for a sample, because copied rows lose nothing.
        """
        if entries is None:
            before = old.double()
            yield Slice(0, 0, before, self.folded(before))


def token_weights(model: nn.Module, record: Record, names: Sequence[str]) -> dict[str, TokenWeight]:
    """Return the trained rows of embeddings and heads, each with the name of its adapter, by weight.

    Args:
        model: A rewritten model.
        record: Its record.
        names: The adapters to merge.

    Raises:
        MergeError: If two of the adapters have the same row, one has rows of a weight that another one
            adapts, or a row is not finite.
    """
    by_weight: dict[str, TokenWeight] = {}
    for name in names:
        for row in record.adapters[name].tokens:
            by_weight.setdefault(row.site.weight, []).append((row, name))
            if not torch.isfinite(gathered(tokens_of(model, row, name))).all():
                raise MergeError(
                    f"{row.name}: adapter {name!r} has rows that are not finite; nothing was merged"
                )
    for weight, several in by_weight.items():
        indices = [index for row, _ in several for index in row.indices]
        if len(set(indices)) < len(indices):
            raise MergeError(
                f"several of the adapters have their own value of a row of {weight} "
                "(trainable_token_indices): merge one"
            )
    for name, fqn in _adapted(record, names):
        if fqn in by_weight:
            raise MergeError(
                f"{by_weight[fqn][0][1]!r} has rows of its own in {fqn} (trainable_token_indices), and "
                f"{name!r} adapts it: merge one"
            )
    return by_weight


def tied_tokens(tokens: Mapping[str, TokenWeight]) -> dict[str, str]:
    """Return the weights of heads that share an embedding's trained rows, with the embedding's weight."""
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
    """Write an adapter's trained rows into a weight at their indices, rounded to the weight's dtype."""
    indices = torch.tensor(row.indices, device=weight.device)
    weight.index_copy_(0, indices, rows.detach().to(weight))


def merged_biases(
    model: nn.Module,
    result: nn.Module,
    rows: Iterable[tuple[PlannedSite, str]],
    trained: Mapping[str, nn.Parameter],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Return the merged biases by FQN: each bias that an adapter changes, with the changes added.

    The models stay as they are.

    Args:
        model: The rewritten model.
        result: The model to merge into.
        rows: Sites and adapters. Those whose kind changes no bias are skipped.
        trained: Parameters that adapters train in full, by FQN. They replace the values of ``result``.
        dtype: The dtype of the biases; their own by default.

    Raises:
        MergeError: If a site has no bias to add to.
    """
    terms: dict[str, list[Term]] = {}
    for row, adapter in rows:
        site, kind = row.site, kind_of(row)
        slots = factors_of(model, row, adapter).slots
        if not slots:
            continue
        source, start, stop = _own_bias(result, row, trained)
        device = next(iter(slots.values())).device if source is None else source.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        part = source[start:stop].to(wide) if source is not None and source.dim() == 1 else None
        slots = {name: gathered(slot).to(device, wide) for name, slot in slots.items()}
        vectors = kind.bias_terms(part, kind.values(site, slots), row.scale)
        if not vectors:
            continue
        if site.bias is None or source is None:
            noun = next(
                (slot for slot in kind.slots(site) if slot.scaled), kind.slots(site)[0]
            ).what
            raise MergeError(
                f"{row.name}: adapter {adapter!r} has {noun} ({kind.field}), and the operation "
                "has none that could take it. Give it one (zeros) before the rewrite, or keep the adapter "
                "unmerged"
            )
        check_stored(result, site.bias)
        if part is None or len(part) < stop - start:
            raise MergeError(
                f"{row.name}: its bias {site.bias} is {list(source.shape)}, and that of B is "
                f"[{site.out_features}]: what they are together is no bias of that shape"
            )
        terms.setdefault(site.bias, [Term(source.to(wide, copy=True))]).extend(
            Term(term, start=start)
            for vector, factor in vectors
            for term in two_products(vector, factor)
        )
    merged = {}
    for name, (first, *changes) in terms.items():
        if first.values.dtype is torch.float64:
            sum_exactly(first.values, lambda changes=changes: iter(changes))  # type: ignore[misc]
        else:
            for term in changes:
                term.within(first.values).add_(term.values)
        merged[name] = rounded(first.values, dtype or result.get_parameter(name).dtype)
    return merged


def _own_bias(
    result: nn.Module, row: PlannedSite, trained: Mapping[str, nn.Parameter]
) -> tuple[torch.Tensor | None, int, int]:
    """Return the bias of a site's operation, and the site's range in it.

    The bias is None if the operation has none, or if it is not a parameter.
    """
    site = row.site
    start, stop = site.rows or (0, site.out_features)
    if site.bias is None:
        return None, start, stop
    owner, _, leaf = site.bias.rpartition(".")
    if getattr(result.get_submodule(owner), leaf, None) is None:
        return None, start, stop  # it was removed since the rewrite
    bias = trained[site.bias] if site.bias in trained else weight_at(result, site.bias)
    return gathered(bias), start, stop


_REMOVED_BY = {
    "WeightNorm": ("torch.nn.utils.weight_norm", "remove_weight_norm"),
    "SpectralNorm": ("torch.nn.utils.spectral_norm", "remove_spectral_norm"),
    "": ("torch.nn.utils.prune", "prune.remove"),
}
"""The utility that computes a weight before each call, and its inverse, by the class of the hook."""


def check_stored(model: nn.Module, name: str) -> None:
    """Raise if a weight is computed before each call or at each read: nothing can be folded into it.

    Raises:
        MergeError: With the way to make the weight permanent.
    """
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    if not is_computed(layer, leaf):
        return
    if parametrize.is_parametrized(layer, leaf):
        by, way = "torch.nn.utils.parametrize", "parametrize.remove_parametrizations"
    else:
        hooks = {type(hook).__name__ for hook in torch_private.forward_pre_hooks(layer).values()}
        known = (name for name in _REMOVED_BY if name in hooks)
        by, way = _REMOVED_BY[next(known, "")]
    raise MergeError(
        f"{name} is computed before each call ({by}), so that nothing can be folded into it: make it "
        f"permanent first, with torch.nn.utils.{way}(layer, {leaf!r})"
    )
