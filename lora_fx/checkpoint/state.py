"""The tensors of an adapter by PEFT's keys, for whoever keeps checkpoints in a way of their own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import (
    Layout,
    Target,
    adapter_record,
    layout_of,
    note_start,
    origin_of,
    targets_of,
    the_adapter,
)
from lora_fx.checkpoint.base_weights import SaveEmbeddings, saved_by_hand, saved_embeddings
from lora_fx.checkpoint.joined import Joined, joined_of, wrapped_parameters
from lora_fx.checkpoint.keys import PREFIX, Dense, Slot, base_name, slots_of
from lora_fx.checkpoint.starts import Converted, converted, other_start
from lora_fx.config import LoraConfig, scale_for
from lora_fx.errors import CheckpointError
from lora_fx.ir import AdapterRecord, PlannedSite, join, record_of
from lora_fx.kinds import kind_of
from lora_fx.passes.insert import start_factors
from lora_fx.passes.parameters import (
    changed_buffers,
    claim,
    factor_names,
    gathered,
    inside,
    is_sharded,
    own_value,
    parameter_of,
    persistent_buffers,
    write,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime import called_by_all, check_equal

__all__ = [
    "Stored",
    "adapter_state_dict",
    "changed",
    "fill",
    "fitted",
    "load_adapter_state_dict",
    "stored",
    "without_prefix",
]


def _values_for(
    slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor]
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """What to write where, and what is wrong with it; nothing is written yet."""
    values: dict[str, tuple[Slot, torch.Tensor]] = {}
    problems: list[str] = []
    seen: set[str] = set()
    for key, slot in slots.items():
        stored = tensors.get(key)
        if stored is None:
            continue
        seen.add(slot.name)
        if tuple(stored.shape) != slot.shape:
            problems.append(_shapes(key, stored, slot.shape))
            continue
        try:
            value = slot.form.decode(stored)
        except CheckpointError as error:
            problems.append(f"not representable: {key} {error}")
            continue
        if slot.name in values and not torch.equal(values[slot.name][1], value):
            problems.append(
                f"contradiction: {key} is another name for {slot.name}, with other values"
            )
        elif slot.tensor.is_meta:
            problems.append(
                f"no place: {slot.name} is on the meta device; give the model its weights first"
            )
        else:
            values[slot.name] = (slot, value)
    problems += [
        f"missing: {slot.key} {list(slot.shape)}"
        for slot in slots.values()
        if slot.required and not slot.alias and slot.name not in seen
    ]
    return list(values.values()), problems


def _other_scales(record: AdapterRecord, config: LoraConfig, names: Mapping[str, str]) -> list[str]:
    """A model that was rewritten before has its scales in the graph.

    Args:
        record: The adapter in the model.
        config: The configuration of the folder.
        names: By what it looks up the scale of a site, where that is not the site's name.
    """
    found = {row.name: scale_for(names.get(row.name, row.name), config) for row in record.sites}
    return [
        f"scale: {row.name} is scaled by {found[row.name]:g} in the folder, by "
        f"{row.scale:g} in the model: load the adapter onto the original model"
        for row in record.sites
        if abs(found[row.name] - row.scale) > 1e-9 * abs(row.scale)
    ]


def _leftover(
    key: str, value: torch.Tensor, model: nn.Module, record: AdapterRecord
) -> Iterator[str]:
    """What is wrong with a tensor that is no part of the adapter; nothing if the model has it.

    PEFT writes the base weight of an embedding or head that it adapts, and with ``bias="all"`` the
    biases of the originals of ``modules_to_save``, which nothing reads.
    """
    kinds = ("original_module", "modules_to_save")
    unread = tuple(f"{name}.{kind}." for name in record.saved_modules for kind in kinds)
    if key.startswith(unread):
        return
    name = base_name(key, model)
    if name is None:
        yield f"unexpected: {key} {list(value.shape)}"
        return
    found = parameter_of(model, name)
    assert found is not None
    own = gathered(found, name)
    if own.shape != value.shape:
        yield _shapes(key, value, own.shape)
    elif not own.is_meta and not torch.equal(own, value.to(own.device, own.dtype)):
        yield (
            f"other base: {key} has other values than {name}, which is frozen in the model. The "
            "adapter was trained on another model, or with another configuration: give that, or "
            "copy the tensor into the model first"
        )


def _shapes(key: str, stored: torch.Tensor, shape: tuple[int, ...]) -> str:
    return f"shape: {key} is {list(stored.shape)} as it was saved, {list(shape)} in the model"


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
    if any(map(is_sharded, (slot.tensor for slot in slots.values()))):
        check_equal(model)
    called_by_all((slot.tensor for slot in slots.values()), f"to save the adapter {adapter!r}")
    whole = converted(model, record, adapter, slots)
    before, record, slots = record, whole.record, whole.slots
    for slot in slots.values():
        if slot.tensor.is_meta:
            raise CheckpointError(f"{slot.name} is on the meta device: there are no values to save")
    tensors = {key: slot.encoded() for key, slot in slots.items() if not slot.alias}
    _to_peft(model, before, adapter, slots, tensors)
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
    values, wrong = _values_for(slots, rest)
    values = _from_peft(model, before, adapter, values, with_start)
    problems += wrong
    if with_start:
        values, wrong = whole.parted(own, values)
        problems += wrong
    if config is not None:
        rows = tuple(row for row in record.sites if row.name not in settled)
        names = {row.name: row.site.weight for row in rows if row.site.weight in weights}
        problems += _other_scales(dataclasses.replace(record, sites=rows), config, names)
        problems += [] if with_start else other_start(record, config)
    # In the order of all processes: they may gather parts together, and a set has another one in each.
    for key in [key for key in rest if key not in slots]:
        problems += _leftover(key, rest[key], model, record)
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
    values = list(values)
    called_by_all((slot.tensor for slot, _ in values), f"to load the adapter {adapter!r}")
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


@inside
def adapter_state_dict(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors that :func:`lora_fx.save_adapter` writes, by the keys that PEFT has for them.

    Those are the keys of ``peft.get_peft_model_state_dict``: with the prefix ``base_model.model.`` and
    without the adapter's name. Sharded parameters (FSDP2) are gathered: every rank has to call this.

    Args:
        model: A rewritten model.
        adapter_name: Which adapter; by default the only one, or the only active one.
        save_embedding_layers: As for :func:`lora_fx.save_adapter`.

    Returns:
        Tensors on the CPU with storage of their own: training on does not change them.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If the model is on the meta device.
    """
    adapter_name = the_adapter(model, adapter_name)
    found = stored(model, adapter_record(model, adapter_name), adapter_name, save_embedding_layers)
    return {PREFIX + key: value for key, value in found.tensors.items()}


@inside
def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str | None = None
) -> None:
    """Writes the values of a state dict into an adapter that the model has.

    A state dict has no configuration: the scales are taken to be those of the adapter.

    Args:
        model: A rewritten model; its adapter is changed in place, and nothing else is.
        state_dict: As of :func:`adapter_state_dict` or PEFT, with the prefix or without.
        adapter_name: Which adapter; by default the only one, or the only active one.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If a tensor is missing, unexpected or of another shape: all of them are named, and
            nothing was changed.
    """
    adapter_name = the_adapter(model, adapter_name)
    record = adapter_record(model, adapter_name)
    values, problems = fitted(model, record, adapter_name, without_prefix(dict(state_dict)), None)
    if problems:
        what = (
            f"the state dict does not fit adapter {adapter_name!r} of this {type(model).__name__}"
        )
        raise CheckpointError("\n  ".join([f"{what}; nothing was changed:", *sorted(problems)]))
    fill(model, adapter_name, values)


# Magnitudes of grouped convolutions. PEFT (up to 0.21.2) divides the magnitude of a convolution by
# ``‖W + s·mm(B, A)‖`` with A [r, in, *k] and B read as [out/g, r], whatever the groups. For one group that is
# the norm of the adapted weight. For several, the product is one that nothing computes. So the magnitude is
# stored times the ratio of that number to the norm: PEFT computes the gain that was trained, and a folder of
# PEFT's has the gain with which PEFT runs it.
def _to_peft(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    slots: Mapping[str, Slot],
    tensors: dict[str, Tensor],
) -> None:
    """Puts magnitudes as PEFT takes them in the place of those of the model.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        slots: By key, what is stored: relative to the base as it was.
        tensors: By key, as they are stored.
    """
    known = {slot.name: gathered(slot.tensor) for slot in slots.values()} if _any(record) else {}
    ratios = dict(_ratios(model, record, adapter, known, whole=True))
    for key, value in tensors.items():
        if slots[key].name in ratios:
            ratio = ratios[slots[key].name].view_as(value)
            tensors[key] = (value.double() * ratio).to(value.dtype)


def _from_peft(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    values: Sequence[tuple[Slot, Tensor]],
    whole: bool,
) -> list[tuple[Slot, Tensor]]:
    """The same the other way round.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        values: What was stored, for the slots of the model.
        whole: Whether the start of the adapter is in the factors, and not in the base.
    """
    known = {slot.name: value for slot, value in values}
    ratios = dict(_ratios(model, record, adapter, known, whole))
    return [
        (slot, (value.double() / ratios[slot.name].view_as(value)).to(value.dtype))
        if slot.name in ratios
        else (slot, value)
        for slot, value in values
    ]


def _any(record: AdapterRecord) -> bool:
    return any(_is_grouped(row) for row in record.sites)


def _is_grouped(row: PlannedSite) -> bool:
    # PEFT has no adapter for transposed convolutions.
    site = row.site
    return site.groups > 1 and site.layout == "out_in" and any(_normed(row))


def _normed(row: PlannedSite) -> tuple[str, ...]:
    """What is compared with the norm of the weight: a magnitude."""
    return tuple(slot.name for slot in kind_of(row).slots(row.site) if slot.normed)


def _ratios(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    known: Mapping[str, Tensor],
    whole: bool,
) -> Iterator[tuple[str, Tensor]]:
    """FQN of each magnitude, and PEFT's number by the norm, [out] in fp64."""
    for row in record.sites:
        if not _is_grouped(row):
            continue
        names = factor_names(row)
        a, b, magnitude = (
            join(row.site.holder, name, adapter) for name in (*names.pair, *_normed(row))
        )
        weight = gathered(model.get_parameter(row.site.weight))
        if not weight.is_meta and {a, b, magnitude} <= known.keys():
            given = (_exact(weight), _exact(known[a]), _exact(known[b]))
            start: Any = start_factors(model, row, adapter) if whole else None
            start = None if start is None else [_exact(gathered(one)) for one in start]
            yield magnitude, _ratio(row, *given, start)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _ratio(
    row: PlannedSite, weight: Tensor, a: Tensor, b: Tensor, start: Sequence[Tensor] | None
) -> Tensor:
    delta = pattern_of(row.site).delta
    if start is not None:
        weight = weight + row.scale * delta(row.site, *start)
    dense = Dense(row.site.groups).encode(a)
    mixed = (b.reshape(-1, len(a)) @ dense.flatten(1)).reshape(weight.shape)
    own, theirs = (
        (weight + row.scale * change).flatten(1).norm(dim=1)
        for change in (delta(row.site, a, b), mixed)
    )
    # A feature without weights has no gain in PEFT, whatever is stored.
    return torch.where((own > 0) & (theirs > 0), theirs / own, 1.0)
