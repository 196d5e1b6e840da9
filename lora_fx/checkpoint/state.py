"""Tensors of an adapter by PEFT's keys, for your own checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fx.adapters import (
    Layout,
    Target,
    adapter_record,
    layout_of,
    note_start,
    on_base,
    origin_of,
    targets_of,
    the_adapter,
)
from lora_fx.checkpoint.joined import Joined, joined_of, wrapped_parameters
from lora_fx.checkpoint.keys import PREFIX, UNREAD, Dense, Slot, base_name, slots_of
from lora_fx.checkpoint.starts import Converted, converted, other_start
from lora_fx.config import LoraConfig, scale_for
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.ir import AdapterRecord, PlannedSite, join, record_of, require_record
from lora_fx.kinds import AdapterKind, kind_of, site_kind
from lora_fx.passes.graph import exchange, memory_of, original_class
from lora_fx.passes.insert import start_factors
from lora_fx.passes.parameters import (
    base_modules,
    base_parameters,
    changed_buffers,
    claim,
    factor_names,
    gathered,
    inside,
    is_sharded,
    own_value,
    parameter_of,
    persistent_buffers,
    place_base,
    trained_by_hand,
    trained_starts,
    write,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime.kernels import dora
from lora_fx.runtime.modules import called_by_all, check_equal

__all__ = [
    "NOTE",
    "Read",
    "SaveEmbeddings",
    "Stored",
    "adapter_state_dict",
    "by_hand_in",
    "changed",
    "deployment_in",
    "fill",
    "fitted",
    "given_values",
    "labels_in",
    "load_adapter_state_dict",
    "note_of_by_hand",
    "note_of_deployment",
    "note_of_labels",
    "place_given",
    "saved_by_hand",
    "saved_embeddings",
    "stored",
    "without_prefix",
]

# --- weights of the base --------------------------------------------------------------------------
# Weights of the base in an adapter's folder: embeddings, heads, and parameters that were trained by hand.
#
# Adding tokens resizes the embedding and the head of a transformers model, and no checkpoint of the base has
# the new rows. PEFT therefore writes these weights if they were resized or adapted
# (``save_embedding_layers``), and so does this module. Parameters that were unfrozen by hand are written
# under the same names, and the metadata of the file lists them. Any other tensor that differs from the
# model's belongs to another base. When a folder is loaded, the weights that differ become the adapter's. They
# are frozen and replace those of the base, which stays as it is.


NOTE = "lora_fx.by_hand"
"""Key of the file's metadata with the FQNs of the parameters that were trained by hand."""

Read = Callable[[str], torch.Tensor | None]
"""Function that returns a weight of the base by its FQN."""

SaveEmbeddings = bool | Literal["auto"]
"""True to save the embedding and head; ``"auto"`` if they were resized, adapted, or came with a folder."""

_ADAPTED = (
    "embed_tokens",
    "lm_head",
)  # PEFT's list: it does not recognize other embeddings and heads.


def saved_embeddings(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    origin: str | None,
    how: SaveEmbeddings,
) -> dict[str, torch.Tensor]:
    """Return the weights of embeddings and heads to save with an adapter, by FQN.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        origin: The source of the base. If it is a folder, its configuration tells the vocabulary.
        how: As PEFT's ``save_embedding_layers``.

    Raises:
        ConfigError: If ``how`` has any other value.
    """
    if how not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: found {how!r}; it is True, False or 'auto'")
    ends = tuple(_embeddings_and_heads(model))
    holders = {row.site.owner for row in record.sites} & set(ends)
    adapted = [name for name in ends if name in holders and name.rpartition(".")[2] in _ADAPTED]
    chosen: Iterable[str] = ends if how else ()
    if how == "auto" and not record.given and not _resized(model, origin):
        # PEFT leaves the other end out even if both were resized, and so loses it.
        chosen = () if record.tokens else adapted
    originals = require_record(model).originals
    values: dict[str, torch.Tensor] = {}
    for name in _parameters(model, chosen):
        values[name] = originals.get(name, model.get_parameter(name))
    left_out = set() if how else set(_parameters(model, ends))
    replaced = [name for name in record.given if name not in left_out]
    return values | {name: own_value(model, adapter, name) for name in replaced}


def saved_by_hand(model: nn.Module, record: AdapterRecord, adapter: str) -> dict[str, torch.Tensor]:
    """Return the parameters that were trained by hand and are to be saved with an adapter, by FQN.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.

    Raises:
        CheckpointError: If a trained weight was replaced by the adapter's initialization, because a folder is
            written for the original base.
    """
    known = require_record(model)
    for name, owner in trained_starts(model, known):
        if owner == adapter:
            raise CheckpointError(
                f"{name} was unfrozen by hand, and the start of adapter {adapter!r} "
                f"(init_lora_weights={record.config.init_lora_weights!r}) has changed it before, so that a "
                "folder has no place for it: name its module in modules_to_save, or merge the adapter and "
                "save the model"
            )
    trained = trained_by_hand(model, known)
    return {name: value for name, value in trained.items() if name not in record.own}


def note_of_by_hand(names: Collection[str]) -> dict[str, str]:
    """Return the metadata of a file that holds parameters trained by hand."""
    return {NOTE: json.dumps(sorted(names))} if names else {}


_LABELS = "lora_fx.id2label"
_DEPLOY = "lora_fx.deploy"


def note_of_deployment(record: AdapterRecord) -> dict[str, str]:
    """Return the metadata of a file with the storage that an adapter was trained for; empty for none."""
    target = next((row.deploy for row in record.sites if row.deploy), None)
    return {} if target is None else {_DEPLOY: target.format}


def deployment_in(metadata: Mapping[str, str]) -> str | None:
    """Return the name of the storage in a note of :func:`note_of_deployment`; None if there is no note."""
    return metadata.get(_DEPLOY)


def note_of_labels(model: nn.Module) -> dict[str, str]:
    """Return the metadata of a file with the class names of a transformers model; empty if it has none.

    Placeholders of transformers (``LABEL_0`` and so on) do not count as names.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, Mapping) or all(
        name == f"LABEL_{index}" for index, name in names.items()
    ):
        return {}
    return {
        _LABELS: json.dumps(
            {str(index): str(name) for index, name in names.items()}, sort_keys=True
        )
    }


def labels_in(metadata: Mapping[str, str]) -> dict[int, str]:
    """Return the class names in a note of :func:`note_of_labels`, by index; empty if there is no note.

    Raises:
        CheckpointError: If lora_fx did not write the note.
    """
    text = metadata.get(_LABELS, "{}")
    try:
        return {int(index): str(name) for index, name in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the metadata {_LABELS!r} of the file is damaged ({text[:60]!r}); save the adapter again"
        ) from error


def by_hand_in(metadata: Mapping[str, str]) -> frozenset[str]:
    """Return the names in a note of :func:`note_of_by_hand`.

    Raises:
        CheckpointError: If lora_fx did not write the note.
    """
    text = metadata.get(NOTE, "[]")
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"the metadata {NOTE!r} of the file is damaged ({text[:60]!r}); save the adapter again"
        )
    return frozenset(names)


def given_values(
    model: nn.Module,
    record: AdapterRecord,
    tensors: Mapping[str, torch.Tensor],
    by_hand: Collection[str],
    read: Read | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder that replace weights of the base and differ from them, by FQN.

    Args:
        model: A rewritten model with a new adapter.
        record: The adapter's record.
        tensors: The tensors of the folder by key, without the prefix.
        by_hand: FQNs of the parameters that were trained by hand.
        read: A function that returns the values of a weight that is on the meta device, or None if they are
            unknown.
    """
    ends = {*_parameters(model, _embeddings_and_heads(model)), *by_hand}
    base = {**dict(base_parameters(model)), **require_record(model).originals}
    differing = {}
    for key, value in tensors.items():
        name = base_name(key, model)
        if name not in ends or name in record.own:
            continue
        old = _with_values(base[name].detach(), name, read)
        if old.shape == value.shape and not old.is_meta:
            value = value.to(old.device, old.dtype)
            if not torch.equal(old, value):
                differing[name] = value
    return differing


def place_given(
    model: nn.Module,
    adapter: str,
    values: Mapping[str, torch.Tensor],
    read: Read | None = None,
) -> None:
    """Replace weights of the base, and every weight that is tied to them, by frozen weights of the adapter.

    Args:
        model: A rewritten model.
        adapter: The adapter's name.
        values: The result of :func:`given_values`.
        read: As for :func:`given_values`.

    Raises:
        CheckpointError: If a weight is in a scripted module; nothing was changed.
    """
    if not values:
        return
    record = require_record(model)
    with on_base(model) as before:
        own, originals = [], dict(record.originals)
        new: dict[object, nn.Parameter] = {}
        # First the weights in the folder, then those that are tied to one of them.
        tied = {memory_of(before[name]) for name in values}
        names = [name for name, old in before.items() if memory_of(old) in tied]
        for name in sorted(names, key=lambda end: end not in values):
            old = before[name]
            parameter = new.get(memory_of(old))
            value = values.get(name)
            if value is not None and (parameter is None or not torch.equal(parameter, value)):
                parameter = nn.Parameter(value.clone(), requires_grad=False)
                new.setdefault(memory_of(old), parameter)
            if parameter is not None:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                if isinstance(module, torch.jit.ScriptModule):
                    raise CheckpointError(
                        f"{name} is in a TorchScript module, whose parameters cannot be exchanged: copy the "
                        "tensor into the model first, or put the module that it was scripted from into it"
                    )
                module._parameters[leaf] = parameter
                own.append(name)
                originals[name] = _with_values(old.detach(), name, read)
        place_base(model, adapter, own, originals)
        entry = record.adapters[adapter]
        entry = dataclasses.replace(entry, own=(*entry.own, *own), given=tuple(own))
        record = record.with_adapter(adapter, entry, originals=originals)
        model.__dict__["_lora_fx"] = record


def _with_values(weight: torch.Tensor, name: str, read: Read | None) -> torch.Tensor:
    """Return a weight. If it is on the meta device, return the values that ``read`` knows for it."""
    if read is None or not weight.is_meta:
        return weight
    values = read(name)
    return weight if values is None else values


def _embeddings_and_heads(model: nn.Module) -> Iterator[str]:
    """Yield the FQNs of the input embedding and of the head of a transformers model."""
    ends = []
    for side in ("input", "output"):
        get = getattr(model, f"get_{side}_embeddings", None)
        try:
            ends.append(get() if callable(get) else None)
        except (NotImplementedError, AttributeError):
            continue
    for name, module in base_modules(model):
        if name and any(module is end for end in ends):
            yield name


def _parameters(model: nn.Module, modules: Iterable[str]) -> Iterator[str]:
    for module in modules:
        for name, parameter in model.get_submodule(module)._parameters.items():
            if parameter is not None:
                yield join(module, name)


def _resized(model: nn.Module, origin: str | None) -> bool:
    """Return True if a local ``config.json`` of the base names another vocabulary size than the model has."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(origin, "config.json") if origin else None
    if size is None or path is None or not path.is_file():
        return False
    try:
        base_size = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return False
    return base_size is not None and base_size != size


# --- the tensors of an adapter --------------------------------------------------------------------


def _values_for(
    slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor], *, empty: bool = False
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """Return the values for the slots, and the problems with them. Nothing is written yet.

    Args:
        slots: The slots by key.
        tensors: The stored tensors by key.
        empty: True if slots may be on the meta device.
    """
    values: dict[str, tuple[Slot, torch.Tensor]] = {}
    problems: list[str] = []
    seen: set[str] = set()
    for key, slot in slots.items():
        stored = tensors.get(key)
        if stored is None:
            continue
        seen.add(slot.name)
        if tuple(stored.shape) != slot.shape:
            problems.append(_shapes(key, stored, slot.shape) + slot.remedy)
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
        elif slot.tensor.is_meta and not empty:
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
    """Return a problem for each site whose scale in the folder differs from the scale in the graph.

    Args:
        record: The adapter in the model.
        config: The configuration of the folder.
        names: The name by which the configuration knows a site, if it differs from the site's name.
    """
    scales = {row.name: scale_for(names.get(row.name, row.name), config) for row in record.sites}
    return [
        f"scale: {row.name} is scaled by {scales[row.name]:g} in the folder, by "
        f"{row.scale:g} in the model: load the adapter onto the original model"
        for row in record.sites
        if abs(scales[row.name] - row.scale) > 1e-9 * abs(row.scale)
    ]


def _other_kinds(record: AdapterRecord, config: LoraConfig) -> Iterator[str]:
    """Yield a problem for each site where the folder's factors mean something else than the model's.

    Most kinds differ in their tensors, which are compared anyway.
    """
    for row in record.sites:
        kind, existing = site_kind(row.site, config), kind_of(row)
        same = (kind.name, kind.options) == (existing.name, existing.options)
        if not same and (kind.dynamic or existing.dynamic):
            yield (
                f"kind: {row.name} has {_described(kind)} in the folder and {_described(existing)} in the "
                "model: load the adapter under another name, or onto the original model"
            )


def _described(kind: AdapterKind) -> str:
    options = (f"{name}={value!r}" for name, value in (kind.options or {}).items())
    return f"the kind {' '.join((kind.name, *options))}"


def _leftover(
    key: str,
    value: torch.Tensor,
    model: nn.Module,
    record: AdapterRecord,
    read: Read | None = None,
) -> Iterator[str]:
    """Check a tensor of a checkpoint that is not part of the adapter, and yield a message if it does not fit.

    PEFT also saves the base weight of an adapted embedding or head. Such a tensor has to equal the weight of
    the model.
    """
    unread = tuple(f"{name}.{kind}." for name in record.saved_modules for kind in UNREAD)
    if key.startswith(unread):
        return
    name = base_name(key, model)
    if name is None:
        yield f"unexpected: {key} {list(value.shape)}"
        return
    parameter = parameter_of(model, name)
    assert parameter is not None
    own = _with_values(gathered(parameter, name), name, read)
    if own.shape != value.shape:
        resized = own.dim() == 2 and own.shape[1:] == value.shape[1:]
        yield _shapes(key, value, own.shape) + (
            f". If tokens were added to the model, call model.resize_token_embeddings({len(value)}) first"
            if resized
            else ""
        )
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
        tensors: The tensors by key, without the prefix. They are on the CPU, and no two share storage.
        targets: The modules and parameters that PEFT adapts, with their ranks and alphas.
        joined: The targets that consist of several sites.
        own: Sites for which PEFT has no name.
        by_hand: FQNs of the base's parameters among the tensors that were trained by hand.
        from_folder: FQNs of the parameters that came with the adapter's folder.
    """

    tensors: dict[str, torch.Tensor]
    targets: list[Target]
    joined: list[Joined]
    own: list[str]
    by_hand: tuple[str, ...] = ()
    from_folder: tuple[str, ...] = ()


def stored(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    embeddings: SaveEmbeddings = "auto",
) -> Stored:
    """Return an adapter as PEFT stores it.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        embeddings: True to store the weights of the embedding and the head as well.

    Raises:
        CheckpointError: If the model is on the meta device, or a parameter trained by hand cannot be saved.
        ConfigError: If ``embeddings`` is not valid.
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
    for joined_target in joined:
        if joined_target.doubled:
            _log.warning(_TWICE, joined_target.name, "is written for that, with half of it")
        rank = joined_target.packed(tensors)
        targets.append(
            Target(
                joined_target.name,
                rank,
                joined_target.alpha(rank),
                joined_target.name in layout.weights,
            )
        )
    own = [row.name for row in record.sites if not row.tied and not layout.place(row.site)]
    return Stored(tensors, targets, joined, own, tuple(by_hand), record.given)


def fitted(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig | None,
    read: Read | None = None,
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """Assign saved tensors to the parameters of an adapter. Nothing is written yet.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        tensors: The saved tensors by key, without the prefix.
        config: The configuration of the saved adapter; None if there is none.
        read: For a model on the meta device, the values of its base, as for :func:`given_values`.

    Returns:
        The slots with their values, and a text for each problem.
    """
    remaining = dict(tensors)
    named = wrapped_parameters(model, config) if config else {}
    weights = {name for names in named.values() for name in names}
    layout = layout_of(model, record, weights)
    base_values = saved_by_hand(model, record, adapter)
    base_values |= {name: own_value(model, adapter, name) for name in record.given}
    own = slots_of(model, record, adapter, layout, persistent_buffers(model), base_values)
    whole = converted(model, record, adapter, own)
    # The file has either the doubled ranks that `stored` writes, or the model's own ranks. In the second
    # case, the start was subtracted from the base.
    with_start = bool(whole.rows) and _has_doubled_ranks(whole, layout, remaining)
    before, slots = record, dict(own)
    if with_start:
        record, slots = whole.record, dict(whole.slots)
    problems: list[str] = []
    settled: set[str] = set()
    for joined_target in joined_of(layout, record):
        present = {key for pair in joined_target.pairs for key in pair.keys} & remaining.keys()
        scale = scale_for(joined_target.name, config) if config else joined_target.scale
        if present and joined_target.doubled:
            _log.warning(_TWICE, joined_target.name, "was taken to be computed so")
        done, wrong = joined_target.split(remaining, scale)
        problems += wrong
        for key in done:
            del slots[key]
        settled |= {member.row.name for member in joined_target.members} if present else set()
    values, wrong = _values_for(slots, remaining, empty=read is not None)
    values = _from_peft(model, before, adapter, values, with_start, read)
    problems += wrong
    if with_start:
        values, wrong = whole.parted(own, values)
        problems += wrong
    if config is not None:
        rows = tuple(row for row in record.sites if row.name not in settled)
        names = {row.name: row.site.weight for row in rows if row.site.weight in weights}
        problems += _other_scales(dataclasses.replace(record, sites=rows), config, names)
        problems += [] if with_start else other_start(record, config)
        problems += _other_kinds(record, config)
    # Processes may gather shards together here, so all need the same order. A set has another order in each.
    for key in [key for key in remaining if key not in slots]:
        problems += _leftover(key, remaining[key], model, record, read)
    return values, problems


def _has_doubled_ranks(
    whole: Converted, layout: Layout, tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Return True if saved factors have the ranks that :func:`stored` writes, and not those of the model.

    The ranks are doubled if the start of the adapter is joined to the factors.
    """
    shapes = {key: slot.shape for key, slot in whole.slots.items() if slot.name in whole.rows}
    for joined_target in joined_of(layout, whole.record):
        shapes |= {
            pair.keys[0]: pair.shape(joined_target.rank)[0]
            for pair in joined_target.pairs
            if pair.members
        }
    matches = [
        shape == tuple(tensors[key].shape) for key, shape in shapes.items() if key in tensors
    ]
    return bool(matches) and all(matches)


def fill(model: nn.Module, adapter: str, values: Iterable[tuple[Slot, torch.Tensor]]) -> None:
    """Write loaded values into an adapter. An adapter that waited for data then has its values.

    The values are those of :func:`fitted`. A tensor on the meta device is replaced by one with the values, on
    the CPU. If a write fails, the earlier writes are undone.
    """
    values = _replace_empty(model, values)
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


def _replace_empty(
    model: nn.Module, values: Iterable[tuple[Slot, torch.Tensor]]
) -> list[tuple[Slot, torch.Tensor]]:
    """Replace the tensors on the meta device by tensors on the CPU that have the loaded values.

    Returns:
        The slots that have memory already, with the values that are still to be written into them.
    """
    left: list[tuple[Slot, torch.Tensor]] = []
    new: dict[int, torch.Tensor] = {}
    for slot, value in values:
        if not slot.tensor.is_meta:
            left.append((slot, value))
            continue
        filled = torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype)
        new[id(slot.tensor)] = filled.copy_(value)
    if new:
        before = list(model.named_parameters(remove_duplicate=False))
        parameters = {
            id(old): nn.Parameter(new[id(old)], old.requires_grad)
            for _, old in before
            if id(old) in new
        }
        for module in model.modules():
            for key, old in module._parameters.items():
                module._parameters[key] = parameters.get(id(old), old)
            for key, buffer in module._buffers.items():
                module._buffers[key] = new.get(id(buffer), buffer)
        exchange(model, before)
    return left


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with PEFT's prefix removed from the keys, if all keys have it."""
    if all(key.startswith(PREFIX) for key in tensors):
        return {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    return tensors


def changed(model: nn.Module) -> list[str]:
    """Return the FQNs of the base's buffers whose values have changed since the rewrite."""
    record: Any = record_of(model)
    return [name for name, _ in changed_buffers(model, record)] if record is not None else []


@inside
def adapter_state_dict(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, torch.Tensor]:
    """Return the tensors that :func:`lora_fx.save_adapter` writes, by PEFT's keys.

    The keys are those of ``peft.get_peft_model_state_dict``: without the adapter's name and with the prefix
    ``base_model.model.``. Models of diffusers have no prefix. Sharded parameters (FSDP2) are gathered, so
    every rank has to call this function.

    Args:
        model: A rewritten model.
        adapter_name: The adapter; by default the only one, or the only active one.
        save_embedding_layers: As for :func:`lora_fx.save_adapter`.

    Returns:
        Tensors on the CPU with their own storage: further training does not change them.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If the model is on the meta device.
    """
    adapter_name = the_adapter(model, adapter_name)
    saved = stored(model, adapter_record(model, adapter_name), adapter_name, save_embedding_layers)
    prefix = "" if _of_diffusers(model) else PREFIX
    return {prefix + key: value for key, value in saved.tensors.items()}


def _of_diffusers(model: nn.Module) -> bool:
    """Return True for a model of diffusers, which puts adapters into it without a PeftModel."""
    return any(
        cls.__name__ == "ModelMixin" and cls.__module__.startswith("diffusers.")
        for cls in original_class(model).__mro__
    )


@inside
def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str | None = None
) -> None:
    """Write the values of a state dict into an adapter of the model.

    A state dict has no configuration: the scales are taken to be those of the adapter.

    Args:
        model: A rewritten model. Its adapter is changed in place; nothing else changes.
        state_dict: Tensors by the keys of :func:`adapter_state_dict` or PEFT, with or without the prefix.
        adapter_name: The adapter; by default the only one, or the only active one.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If a tensor is missing, unexpected or of another shape. The error names all such
            tensors, and nothing was changed.
    """
    adapter_name = the_adapter(model, adapter_name)
    record = adapter_record(model, adapter_name)
    values, problems = fitted(model, record, adapter_name, without_prefix(dict(state_dict)), None)
    if problems:
        summary = (
            f"the state dict does not fit adapter {adapter_name!r} of this {type(model).__name__}"
        )
        raise CheckpointError("\n  ".join([f"{summary}; nothing was changed:", *sorted(problems)]))
    fill(model, adapter_name, values)


# Magnitudes of grouped convolutions. PEFT (up to 0.21.2) divides the magnitude of a convolution by
# ``‖W + s·mm(B, A)‖`` with A [r, in, *k] and B read as [out/g, r], whatever the groups. With one group that
# is the norm of the adapted weight. With several groups, no layer computes this product. So the magnitude is
# stored times the ratio of PEFT's number to the norm. PEFT then computes the gain that was trained, and
# PEFT's folders load here with the gain that PEFT computes.
def _to_peft(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    slots: Mapping[str, Slot],
    tensors: dict[str, Tensor],
) -> None:
    """Convert the magnitudes of grouped convolutions to the values that PEFT expects.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        slots: The slots by key, relative to the original base.
        tensors: The stored tensors by key, changed in place.
    """
    known = (
        {slot.name: gathered(slot.tensor) for slot in slots.values()}
        if _has_grouped_magnitudes(record)
        else {}
    )
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
    read: Read | None = None,
) -> list[tuple[Slot, Tensor]]:
    """Convert the magnitudes of grouped convolutions from PEFT's values to those of the model.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        values: The stored values, for the slots of the model.
        whole: True if the start of the adapter is in the factors, and not in the base.
        read: As for :func:`given_values`.
    """
    known = {slot.name: value for slot, value in values}
    ratios = dict(_ratios(model, record, adapter, known, whole, read))
    return [
        (slot, (value.double() / ratios[slot.name].view_as(value)).to(value.dtype))
        if slot.name in ratios
        else (slot, value)
        for slot, value in values
    ]


def _has_grouped_magnitudes(record: AdapterRecord) -> bool:
    return any(_is_grouped(row) for row in record.sites)


def _is_grouped(row: PlannedSite) -> bool:
    # PEFT has no adapter for transposed convolutions.
    site = row.site
    return site.groups > 1 and site.layout == "out_in" and any(_normed(row))


def _normed(row: PlannedSite) -> tuple[str, ...]:
    """Return the names of the slots of a site that are magnitudes: divided by the norm of the weight."""
    return tuple(slot.name for slot in kind_of(row).slots(row.site) if slot.normed)


def _ratios(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    known: Mapping[str, Tensor],
    whole: bool,
    read: Read | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the FQN of each magnitude of a grouped convolution, and the factor that gives PEFT's value."""
    for row in record.sites:
        if not _is_grouped(row):
            continue
        names = factor_names(row)
        a, b, magnitude = (
            join(row.site.holder, name, adapter) for name in (*names.pair, *_normed(row))
        )
        weight = gathered(model.get_parameter(row.site.weight))
        weight = _with_values(weight, row.site.weight, read)
        if not weight.is_meta and {a, b, magnitude} <= known.keys():
            tensors = (_exact(weight), _exact(known[a]), _exact(known[b]))
            start: Any = start_factors(model, row, adapter) if whole else None
            start = None if start is None else [_exact(gathered(factor)) for factor in start]
            yield magnitude, _ratio(row, *tensors, start)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _ratio(
    row: PlannedSite, weight: Tensor, a: Tensor, b: Tensor, start: Sequence[Tensor] | None
) -> Tensor:
    delta = pattern_of(row.site).delta
    if start is not None:
        weight = weight + row.scale * delta(row.site, *start)
    own = (weight + row.scale * delta(row.site, a, b)).flatten(1).norm(dim=1)
    theirs = dora.dense_norm(weight, Dense(row.site.groups).encode(a), b, row.scale)
    # PEFT has no gain for a feature without weights, so any stored value works.
    return torch.where((own > 0) & (theirs > 0), theirs / own, 1.0)
