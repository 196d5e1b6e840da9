"""Folds adapters into the weights and gives the user's own class back: ``W' = W + s · B A``.

Where the initialisation of an adapter has put W₀ in the place of W, ``W' = W + (W₀ - W) + s · B A``.

Each weight is accumulated in fp64, slice by slice, and rounded once. The result has parameters of
its own where something was folded or trained and shares all others; a tied weight is untied first.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ops import AdapterModule
from lora_fx.passes._change import merged_biases, weight_change
from lora_fx.passes._factors import factors_of
from lora_fx.passes._merge_tokens import TokenWeight, tied_tokens, token_weights
from lora_fx.passes._own import own_value, place_base
from lora_fx.passes._placing import (
    place_biases,
    place_merged,
    place_trained,
    trained,
    untie_config,
)
from lora_fx.passes._region import CONSTANT, is_region, original_class, uninstall
from lora_fx.passes._rounding import rounded, ulp
from lora_fx.passes._sharing import share_copy
from lora_fx.passes._tokens import tokens_of, with_tokens
from lora_fx.record import Record, record_of
from lora_fx.types import PlannedSite

__all__ = [
    "MergeReport",
    "MergedSite",
    "merge",
    "stripped",
]


_log = logging.getLogger("lora_fx")
_CHUNK = 1 << 22  # elements of a weight that are widened to fp64 at a time


@dataclasses.dataclass(frozen=True, slots=True)
class MergedSite:
    """One folded weight.

    Attributes:
        name: FQN of the site.
        adapters: What was folded in.
        max_ulp: Largest error of a merged element against fp64, in units in the last place of the
            weight's dtype; a correctly rounded weight has at most 0.5. NaN if it was not measured.
        relative_change: ``‖ΔW‖ / ‖W‖``; NaN if it was not measured.
    """

    name: str
    adapters: tuple[str, ...]
    max_ulp: float
    relative_change: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        sites: One row a weight.
        untied: FQNs that shared their storage with another parameter and do not any more.
    """

    sites: tuple[MergedSite, ...]
    untied: tuple[str, ...] = ()

    @property
    def max_ulp(self) -> float:
        """The largest error of all."""
        return max((site.max_ulp for site in self.sites), default=0.0)

    def __str__(self) -> str:
        count, worst = len(self.sites), self.max_ulp
        lines = [f"{count} weight(s) merged, largest error {worst:.4f} units in the last place"]
        lines += [
            f"  {s.name}: {s.max_ulp:.4f} ulp, changed by {s.relative_change:.2e}"
            for s in self.sites
        ]
        lines += [f"  untied: {name}" for name in self.untied]
        return "\n".join(lines)


def merge(
    model: nn.Module,
    *,
    adapter_names: Sequence[str] | str | None = None,
    into: nn.Module | None = None,
    measure: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[nn.Module, MergeReport]:
    """Folds adapters into the weights.

    Args:
        model: A rewritten model; it is not changed.
        adapter_names: Which adapters; those that are active by default.
        into: Fold into this model instead of a copy of the base: a model of the original class.
        measure: Whether to compare every merged element with fp64.
        progress: Called with (done, total, site name) before each weight.

    Returns:
        The merged model, and the report.

    Raises:
        MergeError: If the model has no adapters, an adapter does not exist, ``into`` does not fit,
            or a factor or a result is not finite. ``into`` is then as it was.
    """
    record = record_of(model)
    if record is None:
        raise MergeError(
            f"this {type(model).__name__} has no adapters: lora_fx.rewrite makes a model that has "
            "(inside a wrapper such as DataParallel, give what it wraps: model.module)"
        )
    names = _chosen(record, adapter_names)
    if into is not None:
        _check_fits(model, into, record, names)
    result = stripped(model, record) if into is None else into
    tokens = token_weights(model, record, names)
    rows: dict[str, list[tuple[PlannedSite, str]]] = {}
    tied: dict[str, str] = {}
    for name in names:
        weights = {row.name: row.site.weight for row in record.adapters[name].sites}
        for row in record.adapters[name].sites:
            if row.tied:
                tied[row.site.weight] = weights[row.tied]
            rows.setdefault(row.site.weight, []).append((row, name))
            _check_finite(model, row, name)
    sites: list[MergedSite] = []
    merged: dict[str, torch.Tensor] = {}
    for done, (weight, several) in enumerate(rows.items()):
        if progress is not None:
            progress(done, len(rows), several[0][0].name)
        old = result.get_parameter(weight).detach()
        moves = _moves(model, record, several)
        merged[weight] = _folded(model, old, several, moves)
        sites.append(_measured(model, old, merged[weight], several, moves, measure))
    for weight, replaced in tokens.items():
        old = result.get_parameter(weight).detach()
        merged[weight] = old
        for one, name in replaced:
            merged[weight] = with_tokens(merged[weight], one, tokens_of(model, one, name))
        sites.append(_measured_rows(model, old, merged[weight], replaced, measure))
    every = [pair for several in rows.values() for pair in several]
    kept = {name for name, _ in trained(model, record, names)}
    biases = merged_biases(model, result, every, kept)
    # Only now, when nothing can fail any more: `into` is changed as a whole or not at all.
    place_trained(model, result, record, names)
    place_biases(result, biases)
    tied = {weight: to for weight, to in tied.items() if _stay_tied(rows[weight], rows[to])}
    tied |= tied_tokens(tokens)
    untied = place_merged(result, merged, tied)
    if untied:
        _log.warning("tied weights were untied by the merge: %s", ", ".join(untied))
    untie_config(result)
    return result, MergeReport(tuple(sites), untied)


def stripped(model: nn.Module, record: Record) -> nn.Module:
    """A copy of the base model: its own classes, no factors, ``requires_grad`` as it was."""
    result = share_copy(model)
    for name in record.active:
        place_base(result, name, record.adapters[name].own, record.originals, keep=False)
    del result.__dict__["_lora_fx"]
    for module in list(result.modules()):
        uninstall(module)
        for name in [name for name in module._buffers if name.startswith(CONSTANT)]:
            del module._buffers[name]
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterModule):
                del module._modules[name]
    for name, parameter in result.named_parameters():
        parameter.requires_grad = name in record.trainable
    return result


def _chosen(record: Record, adapter_names: Sequence[str] | str | None) -> tuple[str, ...]:
    """The adapters that are meant."""
    if isinstance(adapter_names, str):
        adapter_names = (adapter_names,)
    names = tuple(record.active if adapter_names is None else adapter_names)
    if adapter_names is None and record.adapters and not names:
        raise MergeError(
            "no adapter is active: lora_fx.set_adapter makes one so, or give adapter_names"
        )
    for name in names:
        if name not in record.adapters:
            raise MergeError(
                f"there is no adapter {name!r}: the model has "
                f"{', '.join(map(repr, record.adapters))}"
            )
    if len(set(names)) != len(names):
        raise MergeError(f"an adapter is named twice: {', '.join(map(repr, names))}")
    weights = {row.site.weight for name in names for row in record.adapters[name].sites}
    owned = (own for name in names for own in record.adapters[name].own)
    places = Counter(own for own in owned if own not in weights)
    for place, count in places.items():
        if count > 1:
            raise MergeError(
                f"several of the adapters have their own {place} (modules_to_save, bias): merge one"
            )
    return names


def _moves(
    model: nn.Module, record: Record, rows: list[tuple[PlannedSite, str]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where initialisations moved a weight, as (to, from), in the shape in which it is applied."""
    site = rows[0][0].site
    moves = []
    for name in dict.fromkeys(name for _, name in rows):
        if site.weight in record.adapters[name].own:
            moved = own_value(model, name, site.weight).detach(), record.originals[site.weight]
            moves.append(
                (moved[0].reshape(site.applied_shape), moved[1].reshape(site.applied_shape))
            )
    return moves


def _add_moves(
    total: torch.Tensor, start: int, axis: int, moves: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Adds what the initialisations did to a slice of a weight that begins at ``start``."""
    for to, origin in moves:
        for value, sign in ((to, 1), (origin, -1)):
            total.add_(value.narrow(axis, start, total.shape[axis]).to(total), alpha=sign)


def _check_finite(model: nn.Module, row: PlannedSite, adapter: str) -> None:
    present = factors_of(model, row, adapter).present
    if not all(torch.isfinite(factor).all() for factor in present):
        raise MergeError(
            f"{row.name}: adapter {adapter!r} has factors that are not finite; nothing was merged"
        )


def _folded(
    model: nn.Module,
    old: torch.Tensor,
    rows: list[tuple[PlannedSite, str]],
    moves: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The merged weight, rounded once, in slices of the output axis: no second weight in fp64."""
    wide = torch.float32 if old.device.type == "mps" else torch.float64
    axis = rows[0][0].site.axis
    old = old.reshape(rows[0][0].site.applied_shape)
    merged = torch.empty_like(old)
    features = old.shape[axis]
    step = (
        features if rows[0][0].site.groups > 1 else max(1, _CHUNK * features // max(1, old.numel()))
    )
    for start in range(0, features, step):
        # A copy also where the dtype is fp64 already: `old` belongs to the user's model, too.
        total = old.narrow(axis, start, min(step, features - start)).to(wide, copy=True)
        _add_moves(total, start, axis, moves)
        _add_changes(total, start, model, rows)
        merged.narrow(axis, start, total.shape[axis]).copy_(rounded(total, old.dtype))
    if not torch.isfinite(merged).all() and torch.isfinite(old).all():
        raise MergeError(
            f"{rows[0][0].name}: the merged weight overflows {old.dtype}; merge in a wider dtype"
        )
    return merged.reshape(rows[0][0].site.weight_shape)


def _add_changes(
    total: torch.Tensor, start: int, model: nn.Module, rows: list[tuple[PlannedSite, str]]
) -> None:
    """Adds what sites contribute to a slice of their weight that begins at ``start``."""
    several = any(row.dora for row, _ in rows) and len(rows) > 1
    # What DoRA adds depends on the unadapted weight, whatever else is added to it.
    base = total.clone() if several else total
    for row, adapter in rows:
        axis = row.site.axis
        first, last = row.site.rows or (0, row.site.applied_shape[axis])
        low, high = max(first, start), min(last, start + total.shape[axis])
        if low >= high:
            continue
        outputs = slice(low - first, high - first) if row.site.groups == 1 else slice(None)
        here = (axis, low - start, high - low)
        total.narrow(*here).add_(weight_change(model, row, adapter, base.narrow(*here), outputs))


def _stay_tied(one: list[tuple[PlannedSite, str]], other: list[tuple[PlannedSite, str]]) -> bool:
    """Whether an embedding and a head have the same merged weight: those of one adapter, transposed, have.

    A magnitude scales the columns of the one and the rows of the other.
    """
    return len(one) == len(other) and not any(row.dora for row, _ in (*one, *other))


def _measured(
    model: nn.Module,
    old: torch.Tensor,
    merged: torch.Tensor,
    rows: list[tuple[PlannedSite, str]],
    moves: list[tuple[torch.Tensor, torch.Tensor]],
    measure: bool,
) -> MergedSite:
    name, adapters = rows[0][0].name, tuple(adapter for _, adapter in rows)
    if not measure:
        return _compared(name, adapters, old, merged, None)
    exact = old.to(torch.float64, copy=True)
    applied = exact.view(rows[0][0].site.applied_shape)
    _add_moves(applied, 0, rows[0][0].site.axis, moves)
    _add_changes(applied, 0, model, rows)
    return _compared(name, adapters, old, merged, exact)


def _compared(
    name: str,
    adapters: tuple[str, ...],
    old: torch.Tensor,
    merged: torch.Tensor,
    exact: torch.Tensor | None,
) -> MergedSite:
    if exact is None:
        return MergedSite(name, adapters, math.nan, math.nan)
    error = (merged.double() - exact).abs() / ulp(exact, merged.dtype)
    tiny = torch.finfo(torch.float64).tiny
    change = float((exact - old.double()).norm() / old.double().norm().clamp_min(tiny))
    return MergedSite(name, adapters, float(error.max()), change)


def _measured_rows(
    model: nn.Module,
    old: torch.Tensor,
    merged: torch.Tensor,
    rows: TokenWeight,
    measure: bool,
) -> MergedSite:
    exact = old.to(torch.float64, copy=True)
    for row, adapter in rows if measure else ():
        exact = with_tokens(exact, row, tokens_of(model, row, adapter))
    names = tuple(adapter for _, adapter in rows)
    return _compared(rows[0][0].name, names, old, merged, exact if measure else None)


def _check_fits(model: nn.Module, into: nn.Module, record: Record, names: Sequence[str]) -> None:
    if any(record_of(module) is not None or is_region(module) for module in into.modules()):
        raise MergeError("into is a rewritten model: give the model of the original class")
    if not isinstance(into, original_class(model)):
        raise MergeError(
            f"into is a {type(into).__name__}, the adapters belong to a "
            f"{original_class(model).__name__}"
        )
    shapes = {name: tuple(p.shape) for name, p in into.named_parameters(remove_duplicate=False)}
    wanted = {
        row.site.weight: row.site.weight_shape for n in names for row in record.adapters[n].places
    }
    wanted |= {n: tuple(p.shape) for n, p in trained(model, record, names)}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise MergeError(f"into has no {name} of shape {shape}; found {shapes.get(name)}")
