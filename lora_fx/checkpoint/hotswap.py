"""Replacement of an adapter's values in place, so that a compiled model needs no recompilation.

Compiled code depends on shapes and on the scales, which are constants of the graphs. Factors of a lower rank
are padded with zeros. If the scales differ, their ratio is folded into B.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_fx.adapters import adapter_names, adapter_record, delete_adapter, note_start, the_adapter
from lora_fx.checkpoint.folder import load_adapter
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.ir import AdapterRecord, PlannedSite, require_record
from lora_fx.kinds import RANK, kind_of
from lora_fx.passes.insert import start_factors
from lora_fx.passes.parameters import SiteFactors, factors_of, inside, own_value, tokens_of, write
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.plan import priced

__all__ = ["hotswap_adapter", "prepare_hotswap"]


@inside
def prepare_hotswap(model: nn.Module, rank: int, adapter_name: str | None = None) -> nn.Module:
    """Pad an adapter's factors with zeros, to make room for adapters of a higher rank.

    The adapter's outputs and scale stay the same. Shapes change, so call this before ``torch.compile`` and
    before the first step of an optimizer, which keeps tensors of the old shape. Gradients are dropped.

    Args:
        model: A rewritten model, changed in place.
        rank: The highest rank that will be swapped in.
        adapter_name: The adapter; by default the only one, or the only active one.

    Returns:
        The model itself.

    Raises:
        ConfigError: If there is no such adapter, several could be meant, the rank is below one of its ranks,
            or the groups of a convolution do not divide it.
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank: found {rank!r}; a rank is a whole number of at least 1")
    adapter_name = the_adapter(model, adapter_name)
    old = adapter_record(model, adapter_name)
    for row in old.sites:
        if not kind_of(row).low_rank:
            raise ConfigError(
                f"{row.name} has an adapter of the kind {row.kind!r}, which has no rank"
            )
        if not kind_of(row).widens:
            raise ConfigError(
                f"{row.name} has an adapter of the kind {row.kind!r}, which has no room for a lower rank"
            )
        if _sized_by_rank(row):
            raise ConfigError(
                f"{row.name} has an adapter of the kind {row.kind!r}, whose other tensors have the size of "
                "its rank: swap in adapters of the same rank"
            )
        if rank < row.rank:
            raise ConfigError(f"{row.name} has rank {row.rank}: rank={rank} gives it less room")
        if rank % row.site.groups:
            raise ConfigError(
                f"{row.name} has {row.site.groups} groups, which do not divide {rank}"
            )
    for row in old.sites:
        if not row.tied:
            _widen(model, row, adapter_name, rank)
    rows = tuple(_of_rank(model, row, rank, old.config.use_rslora) for row in old.sites)
    new = dataclasses.replace(old, sites=rows)
    model.__dict__["_lora_fx"] = require_record(model).with_adapter(adapter_name, new)
    return model


@inside
def hotswap_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None
) -> nn.Module:
    """Replace the values of an adapter by those of an adapter folder, without changing any shape.

    The folder's adapter may have a lower rank, another scale and fewer sites: a site that it lacks then adds
    nothing. :func:`prepare_hotswap` makes room for higher ranks.

    Args:
        model: A rewritten model. A compiled one is not compiled again.
        directory: As for :func:`lora_fx.load_adapter`.
        adapter_name: The adapter whose values are replaced, active or not; by default the only one, or the
            only active one.

    Returns:
        The model itself.

    Raises:
        CheckpointError: As :func:`lora_fx.load_adapter`. Also if the folder's adapter has a site, a rank, a
            variant or a trained parameter that the model's adapter cannot hold. The error lists all of them,
            and nothing was changed.
        ConfigError: If there is no such adapter, several could be meant, or it trains biases of the base.
    """
    adapter_name = the_adapter(model, adapter_name)
    old = adapter_record(model, adapter_name)
    if old.biases:
        raise ConfigError(
            f"adapter {adapter_name!r} trains biases of the base (bias={old.config.bias!r}), of which a "
            "model has one adapter at most, so that no other can be swapped in; "
            "lora_fx.load_adapter(model, directory, adapter_name=...) replaces the values of one of the same "
            "shape"
        )
    incoming = _free_name(model, adapter_name)
    # Loading overwrites the buffers outside of saved modules, before the adapters are compared.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    load_adapter(model, directory, adapter_name=incoming)
    try:
        new = adapter_record(model, incoming)
        if problems := sorted(_problems(model, old, adapter_name, new, incoming)):
            for name, buffer in buffers.items():
                write(model.get_buffer(name), buffer)
            raise CheckpointError(
                f"the adapter in {os.fspath(directory)} cannot be swapped into {adapter_name!r}; nothing "
                "was changed:\n  " + "\n  ".join(problems)
            )
        rows = {row.name: row for row in new.sites}
        for row in old.sites:
            _swap(model, row, adapter_name, rows.get(row.name), incoming)
        for name in new.own:
            write(own_value(model, adapter_name, name), own_value(model, incoming, name).detach())
        for tokens in new.tokens:
            write(
                tokens_of(model, tokens, adapter_name), tokens_of(model, tokens, incoming).detach()
            )
    finally:
        delete_adapter(model, incoming)
    note_start(model, adapter_name)
    return model


def _free_name(model: nn.Module, name: str) -> str:
    name = f"{name}_incoming"
    while name in adapter_names(model):
        name += "_"
    return name


def _problems(
    model: nn.Module, old: AdapterRecord, name: str, new: AdapterRecord, incoming: str
) -> Iterator[str]:
    rows = {row.name: row for row in old.sites}
    for row in new.sites:
        existing = rows.get(row.name)
        if existing is None:
            yield f"{row.name}: the model's adapter is not there"
        elif row.rank > existing.rank:
            yield (
                f"{row.name}: rank {row.rank}, and there is room for {existing.rank}: call "
                f"lora_fx.prepare_hotswap(model, {row.rank}) before the model is compiled"
            )
        elif _variant(row) != _variant(existing):
            yield f"{row.name}: the variants differ ({_difference(row, existing)})"
        elif row.rank != existing.rank and (_sized_by_rank(row) or not kind_of(row).widens):
            yield f"{row.name}: rank {row.rank}, and the kind {row.kind!r} has room for {existing.rank} alone"
        elif kind_of(row).new_base:
            yield f"{row.name}: its base is another ({kind_of(row).field}): load it as a second adapter"
        elif existing.scale == 0:
            yield f"{row.name}: the model's adapter has the scale 0, which no factor makes up for"
        elif start_factors(model, row, incoming) or start_factors(model, existing, name):
            yield f"{row.name}: an initialization changed the base: save that adapter converted"
    names = {row.name for row in new.sites}
    for row in old.sites:
        lacking = [slot for slot in kind_of(row).slots(row.site) if slot.neutral is None]
        if lacking and row.name not in names:
            description = lacking[0].what.removeprefix("a ")
            yield f"{row.name}: the folder has no {description} for it"
        if row.tied and row.tied in names and row.name not in names:
            yield f"{row.name}: the folder's adapter of {row.tied} is not tied to it (ensure_weight_tying)"
    yield from _problems_beside_sites(old, new)


def _variant(row: PlannedSite) -> tuple[object, ...]:
    return row.kind, row.options, bool(row.tied)


def _sized_by_rank(row: PlannedSite) -> bool:
    """Return True if a site has tensors besides A and B whose shapes depend on the rank.

    Padding A and B with zeros is not enough for such a site.
    """
    return any(RANK in slot.shape for slot in kind_of(row).slots(row.site))


def _difference(new: PlannedSite, old: PlannedSite) -> str:
    """Return the fields of a configuration in which two versions of a site differ, for an error."""
    kinds = (kind_of(new), kind_of(old)) if _variant(new)[:2] != _variant(old)[:2] else ()
    named = (kind for kind in kinds if kind.name != "lora")
    fields: dict[str, None] = {kind.field: None for kind in named}
    if bool(new.tied) != bool(old.tied):
        fields["ensure_weight_tying"] = None
    return ", ".join(fields)


def _problems_beside_sites(old: AdapterRecord, new: AdapterRecord) -> Iterator[str]:
    for own in sorted(set(old.own) ^ set(new.own)):
        owner = "the folder's" if own in new.own else "the model's"
        yield f"{own}: only {owner} adapter trains it (modules_to_save, bias)"
    old_rows, new_rows = ({row.name: row.indices for row in record.tokens} for record in (old, new))
    for name in sorted(old_rows.keys() | new_rows.keys()):
        if old_rows.get(name) != new_rows.get(name):
            yield (
                f"{name}: the folder's adapter trains its rows {_listed(new_rows.get(name))}, the model's "
                f"{_listed(old_rows.get(name))} (trainable_token_indices)"
            )


def _listed(indices: tuple[int, ...] | None) -> str:
    return ", ".join(map(str, indices or ())) or "none"


def _swap(
    model: nn.Module, row: PlannedSite, name: str, new: PlannedSite | None, incoming: str
) -> None:
    target, kind = factors_of(model, row, name), kind_of(row)
    slots = {spec.name: spec for spec in kind.slots(row.site)}
    if new is None:
        if kind.low_rank:
            write(target.b, torch.zeros_like(target.b))
        for slot, value in target.slots.items():
            neutral = slots[slot].neutral
            assert neutral is not None
            write(value, torch.full_like(value, neutral))
        return
    source, ratio = factors_of(model, new, incoming), new.scale / row.scale
    if kind.low_rank and not row.tied:
        a, b = source.a.detach(), source.b.detach()
        if new.rank != row.rank:
            a, b = _padded(row, source, row.rank)
        write(target.a, a)
        write(target.b, b * ratio)
    for slot, value in target.slots.items():
        coming = source.slots[slot].detach()
        write(value, coming * ratio if slots[slot].scaled else coming)


def _widen(model: nn.Module, row: PlannedSite, adapter: str, rank: int) -> None:
    factors = factors_of(model, row, adapter)
    for old, value in zip(factors.pair, _padded(row, factors, rank), strict=True):
        # Keep the parameter itself, because an optimizer that has made no step yet may refer to it.
        old.grad, old.data = None, value


def _padded(row: PlannedSite, factors: SiteFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B, padded with zeros up to a rank. In a grouped convolution, each group is padded."""
    stacked = pattern_of(row.site).factors(row.site, row.rank).stacked
    a, b, groups = factors.a.detach(), factors.b.detach(), row.site.groups
    axis = 1 if stacked else 0
    by_group = a.unflatten(axis, (groups, a.shape[axis] // groups))  # type: ignore[no-untyped-call]
    return (
        _with_zeros(by_group, axis + 1, rank // groups).flatten(axis, axis + 1),
        _with_zeros(b, axis + 1, rank // groups),
    )


def _with_zeros(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _of_rank(model: nn.Module, row: PlannedSite, rank: int, rslora: bool) -> PlannedSite:
    alpha = row.scale * (math.sqrt(rank) if rslora else rank)
    return priced(model, dataclasses.replace(row, rank=rank, alpha=alpha))
