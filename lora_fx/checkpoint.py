"""Adapter folders, read and written as PEFT does.

The names of the tensors are in :mod:`lora_fx._checkpoint_keys`. Reading is strict: every tensor of
the folder has its place in the model and every place is filled, or nothing is changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx._checkpoint_files import read_tensors, write_folder
from lora_fx._checkpoint_fit import leftover, other_scales, values_for
from lora_fx._checkpoint_keys import PREFIX, Slot, peft_sees, site_names, slots_of
from lora_fx._checkpoint_settings import with_sites, written_config
from lora_fx._checkpoint_starts import check_start, converted, other_start, repeat_start
from lora_fx._checkpoint_tensors import write
from lora_fx.adapters import adapter_names, adapter_record, delete_adapter, put_adapter
from lora_fx.config import CONFIG_NAME, LoraConfig
from lora_fx.errors import CheckpointError, ConfigError, NoMatchError
from lora_fx.ops import check_adapter_name
from lora_fx.passes._buffers import changed_buffers
from lora_fx.passes.capture.auto import Frontend
from lora_fx.passes.selection import saved_entries
from lora_fx.pipeline import plan_model, rewrite_model
from lora_fx.record import record_of

__all__ = ["load_adapter", "save_adapter"]

_log = logging.getLogger("lora_fx")


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    force: bool = False,
) -> Path:
    """Writes an adapter as a PEFT folder, which PEFT, vLLM and :func:`load_adapter` read.

    Beside the factors it holds the trained biases, the modules of ``modules_to_save``, and the
    buffers that training changed (batch-norm statistics). The configuration names every site in
    full. An adapter whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA) is made one of the
    base as it was, of twice the rank; one of LoftQ says so, and the base is quantised again on loading.

    Args:
        model: A rewritten model.
        directory: Where to; made if it is not there. An adapter that is not called "default" goes
            into a subfolder of its name.
        adapter_name: Which adapter.
        force: Whether to replace an adapter that is there already.

    Returns:
        The folder that was written.

    Raises:
        ConfigError: If the model has no such adapter.
        CheckpointError: If an adapter is there already and ``force`` is False, the model is on the
            meta device, or the files cannot be written (a full disk). The folder is then as it was.
    """
    record = adapter_record(model, adapter_name)
    folder = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)
    slots = slots_of(model, record, adapter_name, _changed_buffers(model))
    record, slots = converted(model, record, adapter_name, slots)
    for slot in slots.values():
        if slot.tensor.is_meta:
            raise CheckpointError(f"{slot.name} is on the meta device: there are no values to save")
    own = [row.name for row in record.sites if not peft_sees(row)]
    if own:
        _log.warning(
            "%s: no module stands for these weights: lora_fx loads their adapters, PEFT leaves them out: %s",
            folder,
            ", ".join(own),
        )
    tensors = {PREFIX + key: slot.encoded() for key, slot in slots.items() if not slot.alias}
    write_folder(folder, tensors, written_config(model, record), force=force)
    return folder


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    example_inputs: Any = None,
    frontend: Frontend = "auto",
) -> nn.Module:
    """Reads an adapter folder of PEFT or lora_fx.

    Args:
        model: A model that is not rewritten, which is not touched; or one that was. If that has an
            adapter of this name, which then has to be of this shape, its values are replaced; else the
            adapter is added to those that it has, and :func:`lora_fx.set_adapter` makes it active.
        directory: A local folder. For an adapter that is not called "default", its subfolder of
            that name if there is one.
        adapter_name: What to call the adapter; the folder does not say.
        example_inputs: As for :func:`lora_fx.rewrite`, for a model that is not rewritten. An adapter
            that was trained on a model rewritten with them may need them again.
        frontend: Likewise.

    Returns:
        A model with the adapter, as :func:`lora_fx.rewrite` makes it: a new one, or, if ``model``
        is rewritten, ``model`` itself. It can be trained on: the note ``inference_mode`` that
        PEFT puts into every folder is not heeded. Values are cast to the dtype of their place.

    Raises:
        CheckpointError: If the folder or a file is missing or damaged, is no LoRA adapter, is a
            pickle that could run code, or does not fit the model: every tensor that is missing,
            unexpected or of another shape is named. Nothing was changed then.
        ConfigError: If the adapter needs a feature that lora_fx does not have, or the model is
            rewritten and is to be captured anew.
        CaptureError: If the model cannot be captured so.
    """
    check_adapter_name(adapter_name)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    folder = _folder(directory, adapter_name)
    config = LoraConfig.from_pretrained(folder)
    check_start(config, folder)
    tensors = _without_prefix(read_tensors(folder))
    how: dict[str, Any] = {"example_inputs": example_inputs, "frontend": frontend}
    if record_of(model) is None:
        target = _rewritten(model, config, tensors, folder, adapter_name, how)
        values, problems = _values(target, config, tensors, adapter_name)
    elif example_inputs is not None or frontend != "auto":
        raise ConfigError(
            "the model is rewritten already: example_inputs and frontend say how to capture one that "
            "is not. Leave them out, or give the original model"
        )
    elif adapter_name in adapter_names(model):
        target = model
        values, problems = _values(target, config, tensors, adapter_name)
    else:
        target = _extended(model, config, tensors, folder, adapter_name)
        values, problems = _values(target, config, tensors, adapter_name)
        if problems:
            delete_adapter(model, adapter_name)
    if problems:
        reasons = _reasons(model, config, tensors, how)
        raise CheckpointError("\n  ".join([_misfit(folder, model), *sorted(problems), *reasons]))
    for slot, value in values:
        write(slot.tensor, value)
    _note_stale_buffers(target, {slot.name for slot, _ in values})
    return target


def _folder(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the local folder of a PEFT adapter")
    inner = folder / adapter_name
    return inner if adapter_name != "default" and (inner / CONFIG_NAME).is_file() else folder


def _without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if all(key.startswith(PREFIX) for key in tensors):
        return {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    return tensors


def _rewritten(
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
    how: dict[str, Any],
) -> nn.Module:
    names = site_names(model, tensors)
    if not names and not saved_entries(config) and not config.trainable_token_indices:
        raise CheckpointError(
            f"{folder} holds no LoRA factor; found {len(tensors)} other tensor(s): {_some(tensors)}"
        )
    exact = with_sites(config, names, model)
    try:
        result = rewrite_model(model, exact, adapter_name=adapter_name, **how)
    except NoMatchError as error:
        lines = [f"unexpected: {key} {list(value.shape)}" for key, value in sorted(tensors.items())]
        raise CheckpointError(
            "\n  ".join([_misfit(folder, model), *lines, *_reasons(model, config, tensors, how)])
        ) from error
    repeat_start(result, adapter_name, config)
    return result


def _extended(
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
) -> nn.Module:
    """A rewritten model with one more adapter, which has no values yet."""
    exact = with_sites(config, site_names(model, tensors), model)
    try:
        put_adapter(model, exact, adapter_name)
    except NoMatchError as error:
        lines = [f"unexpected: {key} {list(value.shape)}" for key, value in sorted(tensors.items())]
        raise CheckpointError("\n  ".join([_misfit(folder, model), *lines])) from error
    try:
        repeat_start(model, adapter_name, config)
    except CheckpointError:
        delete_adapter(model, adapter_name)
        raise
    return model


def _values(
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """What to write where, and everything that does not fit."""
    record = adapter_record(model, adapter_name)
    slots = slots_of(model, record, adapter_name, _persistent_buffers(model))
    values, problems = values_for(slots, tensors)
    problems += other_scales(record, config)
    problems += other_start(record, config)
    for key in tensors.keys() - slots.keys():
        problems += leftover(key, tensors[key], model, record)
    return values, problems


def _reasons(
    model: nn.Module,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    how: dict[str, Any],
) -> list[str]:
    """Why the sites of a folder that are operations of the model are not adapted."""
    if record_of(model) is not None:
        return []
    names = set(site_names(model, tensors))
    try:
        _, plan = plan_model(model, with_sites(config, names, model), **how)
    except NoMatchError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    known = {skipped.site.name: skipped.reason for skipped in plan.skipped}
    known |= {rejection.name: rejection.reason for rejection in plan.rejections}
    return [f"because {name}: {known[name]}" for name in sorted(names & known.keys())]


def _misfit(folder: Path, model: nn.Module) -> str:
    return (
        f"the adapter in {folder} does not fit this {type(model).__name__}; nothing was changed. "
        "Give the model that it was trained on (and the frontend and the example_inputs, if that was "
        "rewritten with some):"
    )


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"


def _persistent_buffers(model: nn.Module) -> list[str]:
    state = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_buffers() if name in state]


def _changed_buffers(model: nn.Module) -> list[str]:
    """Buffers of the base model that have other values than at the rewrite."""
    record = record_of(model)
    return [name for name, _ in changed_buffers(model, record)] if record is not None else []


def _note_stale_buffers(model: nn.Module, loaded: set[str]) -> None:
    stale = [name for name in _changed_buffers(model) if name not in loaded]
    if stale:
        _log.warning(
            "these buffers, which training has changed, keep their values, since the folder does "
            "not hold them: %s. For the outputs that it had, load it onto the original model",
            ", ".join(stale),
        )
