"""Weights of the base in an adapter's folder: of embeddings and heads, and what was trained by hand.

Who adds tokens resizes both ends of a transformers model, and the rows that are new are in no checkpoint of
the base. PEFT therefore writes these weights where they were resized, or adapted (``save_embedding_layers``),
and so does this. What somebody has trained although no adapter trains it is written under the same names,
and the metadata of the file says which that is: anything else that differs from the model's belongs to
another base. Read, what differs is the adapter's own, in the place of the base's and frozen: the model that
was given stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lora_fx.adapters import on_base
from lora_fx.checkpoint.keys import base_name
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.ir import AdapterRecord, join, require_record
from lora_fx.passes.graph import memory_of
from lora_fx.passes.parameters import (
    base_modules,
    base_parameters,
    own_value,
    place_base,
    trained_by_hand,
    trained_starts,
)

__all__ = [
    "NOTE",
    "SaveEmbeddings",
    "by_hand_in",
    "given_values",
    "note_of_by_hand",
    "place_given",
    "saved_by_hand",
    "saved_embeddings",
]

NOTE = "lora_fx.by_hand"
"""Key of the file's metadata with the FQNs of what was trained by hand."""

SaveEmbeddings = bool | Literal["auto"]
"""Whether the weights of both ends are saved; ``"auto"`` where they were resized, adapted, or given."""

_ADAPTED = ("embed_tokens", "lm_head")  # PEFT's: other names it does not take for an end.


def saved_embeddings(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    origin: str | None,
    how: SaveEmbeddings,
) -> dict[str, torch.Tensor]:
    """What to save beside an adapter, by FQN.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        origin: Where the base came from: if that is a folder, its configuration tells its vocabulary.
        how: As PEFT's ``save_embedding_layers``.

    Raises:
        ConfigError: If ``how`` is something else.
    """
    if how not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: found {how!r}; it is True, False or 'auto'")
    ends = tuple(_ends(model))
    holders = {row.site.owner for row in record.sites} & set(ends)
    adapted = [name for name in ends if name in holders and name.rpartition(".")[2] in _ADAPTED]
    chosen: Iterable[str] = ends if how else ()
    if how == "auto" and not record.given and not _resized(model, origin):
        # PEFT leaves the other end out also where both were resized, and so loses it.
        chosen = () if record.tokens else adapted
    originals = require_record(model).originals
    values: dict[str, torch.Tensor] = {}
    for name in _parameters(model, chosen):
        values[name] = originals.get(name, model.get_parameter(name))
    left_out = set() if how else set(_parameters(model, ends))
    given = [name for name in record.given if name not in left_out]
    return values | {name: own_value(model, adapter, name) for name in given}


def saved_by_hand(model: nn.Module, record: AdapterRecord, adapter: str) -> dict[str, torch.Tensor]:
    """What was trained by hand and is to be saved beside an adapter, by FQN.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.

    Raises:
        CheckpointError: If a weight is trained that the adapter's initialization has put in the place of the
            base's: a folder is written for the base as it was.
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
    found = trained_by_hand(model, known)
    return {name: value for name, value in found.items() if name not in record.own}


def note_of_by_hand(names: Collection[str]) -> dict[str, str]:
    """The metadata of a file that holds such parameters."""
    return {NOTE: json.dumps(sorted(names))} if names else {}


def by_hand_in(metadata: Mapping[str, str]) -> frozenset[str]:
    """Reads what :func:`note_of_by_hand` wrote.

    Raises:
        CheckpointError: If the note is not one that lora_fx wrote.
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
) -> dict[str, torch.Tensor]:
    """What of a folder are other weights than the model has, and meant to be, by FQN.

    Args:
        model: A rewritten model, with an adapter that is new.
        record: The adapter's record.
        tensors: By key, without the prefix.
        by_hand: FQNs of what was trained by hand.
    """
    ends = {*_parameters(model, _ends(model)), *by_hand}
    base = {**dict(base_parameters(model)), **require_record(model).originals}
    found = {}
    for key, value in tensors.items():
        name = base_name(key, model)
        if name not in ends or name in record.own:
            continue
        old = base[name].detach()
        if old.shape == value.shape and not old.is_meta:
            value = value.to(old.device, old.dtype)
            if not torch.equal(old, value):
                found[name] = value
    return found


def place_given(model: nn.Module, adapter: str, values: Mapping[str, torch.Tensor]) -> None:
    """Puts such weights into a model as the adapter's own, also where they are tied to one of them.

    Raises:
        CheckpointError: If one is in a module that is scripted; nothing was changed.
    """
    if not values:
        return
    record = require_record(model)
    with on_base(model) as before:
        own, originals = [], dict(record.originals)
        new: dict[object, nn.Parameter] = {}
        # First those that the folder has, then what is tied to one of them.
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
                originals[name] = old.detach()
        place_base(model, adapter, own, originals)
        entry = record.adapters[adapter]
        entry = dataclasses.replace(entry, own=(*entry.own, *own), given=tuple(own))
        record = record.with_adapter(adapter, entry, originals=originals)
        model.__dict__["_lora_fx"] = record


def _ends(model: nn.Module) -> Iterator[str]:
    """FQNs of the input embedding and of the head of a model of transformers."""
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
    """Whether the base had another vocabulary, as far as a folder on this machine tells."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(origin, "config.json") if origin else None
    if size is None or path is None or not path.is_file():
        return False
    try:
        there = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return False
    return there is not None and there != size
