"""An adapter as tensors in PEFT's layout, and the way back into a model: no files here."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.checkpoint_layout import Layout, layout_of
from lora_fx.adapters.manage import note_start
from lora_fx.adapters.settings import Target, origin_of, targets_of
from lora_fx.checkpoint.base_weights import SaveEmbeddings, saved_by_hand, saved_embeddings
from lora_fx.checkpoint.checkpoint_fit import leftover, other_scales, values_for
from lora_fx.checkpoint.checkpoint_joined import Joined, joined_of
from lora_fx.checkpoint.checkpoint_tensors import write
from lora_fx.checkpoint.grouped import from_peft, to_peft
from lora_fx.checkpoint.joined import wrapped_parameters
from lora_fx.checkpoint.keys import PREFIX, Slot, slots_of
from lora_fx.checkpoint.starts import Converted, converted, other_start
from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import scale_for
from lora_fx.errors import CheckpointError
from lora_fx.ir.record import AdapterRecord, record_of
from lora_fx.passes.parameters.buffers import changed_buffers, persistent_buffers
from lora_fx.passes.parameters.by_hand import claim
from lora_fx.passes.parameters.own import own_value

__all__ = [
    "Stored",
    "changed",
    "fill",
    "fitted",
    "stored",
    "without_prefix",
]

_log = logging.getLogger("lora_fx")
_TWICE = "%s: PEFT up to 0.21.2 adds the product of out_proj twice (huggingface/peft#3774); the adapter %s"


@dataclasses.dataclass(frozen=True)
class Stored:
    """An adapter in PEFT's layout.

    Attributes:
        tensors: By key, without the prefix: on the CPU, none sharing storage with another.
        targets: What PEFT adapts, with its ranks and alphas.
        joined: The targets that are made of several sites.
        own: Sites for which PEFT has no name.
        by_hand: FQNs of the base's parameters among the tensors that were trained by hand.
        given: Those that came with the adapter's folder.
    """

    tensors: dict[str, torch.Tensor]
    targets: list[Target]
    joined: list[Joined]
    own: list[str]
    by_hand: tuple[str, ...] = ()
    given: tuple[str, ...] = ()


def stored(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    embeddings: SaveEmbeddings = "auto",
) -> Stored:
    """An adapter as PEFT stores it.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        embeddings: Whether the weights of the embedding and the head are stored as well.

    Raises:
        CheckpointError: If the model is on the meta device, or what was trained by hand has no place.
        ConfigError: If ``embeddings`` cannot mean anything.
    """
    layout = layout_of(model, record)
    origin = record.config.base_model_name_or_path or origin_of(model)
    ends = saved_embeddings(model, record, adapter, origin, embeddings)
    by_hand = saved_by_hand(model, record, adapter)
    slots = slots_of(model, record, adapter, layout, changed(model), ends | by_hand)
    whole = converted(model, record, adapter, slots)
    before, record, slots = record, whole.record, whole.slots
    for slot in slots.values():
        if slot.tensor.is_meta:
            raise CheckpointError(f"{slot.name} is on the meta device: there are no values to save")
    tensors = {key: slot.encoded() for key, slot in slots.items() if not slot.alias}
    to_peft(model, before, adapter, slots, tensors)
    targets = targets_of(record, layout)
    joined = joined_of(layout, record)
    for one in joined:
        if one.doubled:
            _log.warning(_TWICE, one.name, "is written for that, with half of it")
        rank = one.packed(tensors)
        targets.append(Target(one.name, rank, one.alpha(rank), one.name in layout.weights))
    own = [row.name for row in record.sites if not row.tied and not layout.place(row.site)]
    return Stored(tensors, targets, joined, own, tuple(by_hand), record.given)


def fitted(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig | None,
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """What to write where, and what is wrong with it; nothing is written yet.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        tensors: By key, without the prefix.
        config: The configuration that they were saved with; None if there is none.
    """
    rest = dict(tensors)
    named = wrapped_parameters(model, config) if config else {}
    weights = {name for names in named.values() for name in names}
    layout = layout_of(model, record, weights)
    given = saved_by_hand(model, record, adapter)
    given |= {name: own_value(model, adapter, name) for name in record.given}
    own = slots_of(model, record, adapter, layout, persistent_buffers(model), given)
    whole = converted(model, record, adapter, own)
    # As it is written, or with the model's own ranks: the start is in the model then.
    with_start = bool(whole.rows) and _written_so(whole, layout, rest)
    before, slots = record, dict(own)
    if with_start:
        record, slots = whole.record, dict(whole.slots)
    problems: list[str] = []
    settled: set[str] = set()
    for one in joined_of(layout, record):
        there = {key for pair in one.pairs for key in pair.keys} & rest.keys()
        scale = scale_for(one.name, config) if config else one.scale
        if there and one.doubled:
            _log.warning(_TWICE, one.name, "was taken to be computed so")
        done, wrong = one.split(rest, scale)
        problems += wrong
        for key in done:
            del slots[key]
        settled |= {member.row.name for member in one.members} if there else set()
    values, wrong = values_for(slots, rest)
    values = from_peft(model, before, adapter, values, with_start)
    problems += wrong
    if with_start:
        values, wrong = whole.parted(own, values)
        problems += wrong
    if config is not None:
        rows = tuple(row for row in record.sites if row.name not in settled)
        names = {row.name: row.site.weight for row in rows if row.site.weight in weights}
        problems += other_scales(dataclasses.replace(record, sites=rows), config, names)
        problems += [] if with_start else other_start(record, config)
    for key in rest.keys() - slots.keys():
        problems += leftover(key, rest[key], model, record)
    return values, problems


def _written_so(whole: Converted, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether factors have the ranks that they are written with, and not those that the model has."""
    shapes = {key: slot.shape for key, slot in whole.slots.items() if slot.name in whole.rows}
    for one in joined_of(layout, whole.record):
        shapes |= {pair.keys[0]: pair.shape(one.rank)[0] for pair in one.pairs if pair.members}
    found = [shape == tuple(tensors[key].shape) for key, shape in shapes.items() if key in tensors]
    return bool(found) and all(found)


def fill(model: nn.Module, adapter: str, values: Iterable[tuple[Slot, torch.Tensor]]) -> None:
    """Writes what :func:`fitted` has found; an adapter that waited for data has its values now.

    All of it or nothing: where a write fails, what was written before has its values back.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for slot, value in values:
            claim(slot.tensor)
            before.append((slot.tensor, slot.tensor.detach().clone()))
            write(slot.tensor, value)
    except BaseException:
        with torch.no_grad():
            for tensor, value in reversed(before):
                tensor.copy_(value)
        raise
    note_start(model, adapter)


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by the names that modules of the base model have in it."""
    if all(key.startswith(PREFIX) for key in tensors):
        return {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    return tensors


def changed(model: nn.Module) -> list[str]:
    """Buffers of the base model that have other values than at the rewrite."""
    record: Any = record_of(model)
    return [name for name, _ in changed_buffers(model, record)] if record is not None else []
