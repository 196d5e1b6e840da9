"""Adapter folders, read and written as PEFT does.

The names of the tensors are in :mod:`lora_fx.checkpoint.keys`. Reading is strict: every tensor of
the folder has its place in the model and every place is filled, or nothing is changed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import (
    adapter_names,
    adapter_record,
    delete_adapter,
    put_adapter,
    the_adapter,
    with_targets,
    written_config,
)
from lora_fx.checkpoint.base_weights import (
    SaveEmbeddings,
    by_hand_in,
    given_values,
    note_of_by_hand,
    place_given,
)
from lora_fx.checkpoint.files import read_tensors, write_folder
from lora_fx.checkpoint.joined import note_of, parts_in, stored_targets
from lora_fx.checkpoint.keys import PREFIX
from lora_fx.checkpoint.starts import check_start, repeat_start
from lora_fx.checkpoint.state import Stored, changed, fill, fitted, stored, without_prefix
from lora_fx.config import CONFIG_NAME, LoraConfig, judge, saved_entries, scale_of
from lora_fx.errors import CheckpointError, ConfigError, NoMatchError
from lora_fx.ir import AdapterRecord, record_of
from lora_fx.kinds import kind_of
from lora_fx.passes.capture import Frontend
from lora_fx.passes.parameters import check_alike, inside
from lora_fx.passes.pipeline import plan_model, rewrite_model
from lora_fx.runtime import check_adapter_name

__all__ = ["folder_of", "load_adapter", "save_adapter"]


_log = logging.getLogger("lora_fx")


@inside
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    force: bool = False,
    vllm: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> Path:
    """Writes an adapter as a PEFT folder, which PEFT, vLLM and :func:`load_adapter` read.

    Beside the factors it holds the trained biases, the modules of ``modules_to_save``, and the
    buffers that training changed (batch-norm statistics). The configuration names every site in
    full. An adapter whose initialization changed the base (PiSSA, OLoRA, CorDA, LoRA-GA) is made one of the
    base as it was, of twice the rank; one of LoftQ says so, and the base is quantized again on loading.

    Parameters of the base that were unfrozen by hand, and those of a module that was put in the place of one
    of the base, are written under their own names, with a warning: PEFT and :func:`load_adapter` read them.
    ``modules_to_save`` is the way to have them trained as part of an adapter.

    Args:
        model: A rewritten model.
        directory: Where to; made if it is not there. An adapter that is not called "default" goes
            into a subfolder of its name.
        adapter_name: Which adapter; by default the only one, or the only active one.
        force: Whether to replace an adapter that is there already.
        vllm: Whether to write it so that vLLM serves it, which looks at no pattern: with one rank and one
            alpha, the rest in B. PEFT and :func:`load_adapter` read that as well.
        save_embedding_layers: Whether the weights of the embedding and the head of a transformers model are
            written, too. By default, as in PEFT, where one called ``embed_tokens`` or ``lm_head`` is adapted
            or the vocabulary is not that of the base's ``config.json`` (if that is on this machine), but not
            for vLLM.

    Returns:
        The folder that was written.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If an adapter is there already and ``force`` is False, the model is on the
            meta device, vLLM would refuse the adapter or a part of it, or the files cannot be written (a
            full disk). The folder is then as it was.
    """
    adapter_name = the_adapter(model, adapter_name)
    record = adapter_record(model, adapter_name)
    folder = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)
    if vllm and save_embedding_layers == "auto":
        save_embedding_layers = False
    values, config, notes = folder_of(
        model, record, adapter_name, save_embedding_layers, vllm=vllm, folder=folder
    )
    tensors = {PREFIX + key: value for key, value in values.items()}
    write_folder(folder, tensors, config, notes=notes, force=force)
    return folder


def folder_of(
    model: nn.Module,
    record: AdapterRecord,
    adapter_name: str,
    save_embedding_layers: SaveEmbeddings = "auto",
    *,
    vllm: bool = False,
    folder: Path | str = "save_pretrained",
) -> tuple[Mapping[str, torch.Tensor], LoraConfig, dict[str, str]]:
    """What is in an adapter's folder: tensors without PEFT's prefix, configuration, further metadata.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter_name: Its name.
        save_embedding_layers: As for :func:`save_adapter`.
        vllm: Likewise.
        folder: What warnings name.

    Raises:
        CheckpointError: As :func:`save_adapter`.
    """
    found = stored(model, record, adapter_name, save_embedding_layers)
    config = written_config(model, record, found.targets)
    if found.own:
        _log.warning(
            "%s: PEFT has no name for these weights: lora_fx loads their adapters, PEFT leaves them out: %s",
            folder,
            ", ".join(found.own),
        )
    if found.by_hand:
        _log.warning(
            "%s: these parameters are trained, and no adapter trains them: they are saved beside it, in "
            "full. modules_to_save makes them part of an adapter: %s",
            folder,
            _some(found.by_hand),
        )
    if config.lora_dropout != record.config.lora_dropout:
        _log.warning(
            "%s: PEFT allows no dropout where it adapts a parameter (%s): lora_dropout=%g was left out of "
            "the configuration",
            folder,
            ", ".join(config.target_parameters or ()),
            record.config.lora_dropout,
        )
    values, notes = found.tensors, note_of(found.joined)
    notes |= note_of_by_hand({*found.by_hand, *found.given})
    if vllm:
        # One rank for all is none of the parts: the whole is read as one adapter again.
        (values, config), notes = _for_vllm(found, record, config), {}
    return values, config, notes


@inside
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
    read, metadata = read_tensors(folder)
    tensors = without_prefix(read)
    how: dict[str, Any] = {"example_inputs": example_inputs, "frontend": frontend}
    known = record_of(model) is not None and adapter_name in adapter_names(model)
    if record_of(model) is None:
        targets = stored_targets(model, config, tensors, parts_in(metadata))
        exact = with_targets(config, targets, model)
        target = _rewritten(model, exact, tensors, folder, adapter_name, how)
    elif example_inputs is not None or frontend != "auto":
        raise ConfigError(
            "the model is rewritten already: example_inputs and frontend say how to capture one that "
            "is not. Leave them out, or give the original model"
        )
    elif known:
        exact, target = config, model
    else:
        targets = stored_targets(model, config, tensors, parts_in(metadata))
        exact, target = with_targets(config, targets, model), model
        _extend(model, exact, tensors, folder, adapter_name)
    try:
        if not known:
            repeat_start(target, adapter_name, config)
            record = adapter_record(target, adapter_name)
            given = given_values(target, record, tensors, by_hand_in(metadata))
            if given:
                _log.warning(
                    "%s: the folder has other values of %s than the model: they come and go with the adapter",
                    folder,
                    ", ".join(given),
                )
            place_given(target, adapter_name, given)
        record = adapter_record(target, adapter_name)
        values, problems = fitted(target, record, adapter_name, tensors, config)
        if problems:
            reasons = _reasons(model, exact, how)
            raise CheckpointError(
                "\n  ".join([_misfit(folder, model, known), *sorted(problems), *reasons])
            )
        fill(target, adapter_name, values)
        check_alike(target, record.sites, adapter_name)
    except BaseException:
        if target is model and not known:
            delete_adapter(model, adapter_name)
        raise
    _note_stale_buffers(target, {slot.name for slot, _ in values})
    return target


def _folder(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the local folder of a PEFT adapter")
    inner = folder / adapter_name
    if adapter_name != "default" and (inner / CONFIG_NAME).is_file():
        return inner
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if below and not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}; did you mean {' or '.join(map(str, below[:5]))}? An adapter "
            'that is not called "default" is saved into a subfolder of its name'
        )
    return folder


def _rewritten(
    model: nn.Module,
    exact: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
    how: dict[str, Any],
) -> nn.Module:
    nothing = not exact.target_modules and not exact.target_parameters
    if nothing and not saved_entries(exact) and not exact.trainable_token_indices:
        raise CheckpointError(
            f"{folder} holds no LoRA factor; found {len(tensors)} other tensor(s): {_some(tensors)}"
        )
    try:
        return rewrite_model(model, exact, adapter_name=adapter_name, **how)
    except NoMatchError as error:
        lines = [f"unexpected: {key} {list(value.shape)}" for key, value in sorted(tensors.items())]
        raise CheckpointError(
            "\n  ".join([_misfit(folder, model), *lines, *_reasons(model, exact, how)])
        ) from error


def _extend(
    model: nn.Module,
    exact: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
) -> None:
    """Gives a rewritten model one more adapter, which has no values yet."""
    try:
        put_adapter(model, exact, adapter_name)
    except NoMatchError as error:
        lines = [f"unexpected: {key} {list(value.shape)}" for key, value in sorted(tensors.items())]
        raise CheckpointError("\n  ".join([_misfit(folder, model), *lines])) from error


def _reasons(model: nn.Module, exact: LoraConfig, how: dict[str, Any]) -> list[str]:
    """Why the sites of a folder that are operations of the model are not adapted."""
    if record_of(model) is not None:
        return []
    try:
        _, plan = plan_model(model, exact, **how)
    except NoMatchError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    known = {skipped.site.name: skipped.reason for skipped in plan.skipped}
    known |= {rejection.name: rejection.reason for rejection in plan.rejections}
    asked = {name for name in known if judge(name, exact).selected}
    return [f"because {name}: {known[name]}" for name in sorted(asked)]


def _misfit(folder: Path, model: nn.Module, known: bool = False) -> str:
    if known:
        return (
            f"the adapter in {folder} does not fit the one of this name that this {type(model).__name__} "
            "has; nothing was changed. Give it another name, or load it onto the original model:"
        )
    return (
        f"the adapter in {folder} does not fit this {type(model).__name__}; nothing was changed. "
        "Give the model that it was trained on (and the frontend and the example_inputs, if that was "
        "rewritten with some):"
    )


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(sorted(names)[:5]) or "none") + more


def _note_stale_buffers(model: nn.Module, loaded: set[str]) -> None:
    stale = [name for name in changed(model) if name not in loaded]
    if stale:
        _log.warning(
            "these buffers, which training has changed, keep their values, since the folder does "
            "not hold them: %s. For the outputs that it had, load it onto the original model",
            ", ".join(stale),
        )


# vLLM reads PEFT's folders in part. It takes ``r`` and ``lora_alpha`` for every layer and reads no pattern:
# with r the highest rank, smaller A and B are padded with zeros, and B is multiplied by the ratio of a
# layer's scale to that of all. vLLM refuses what a kind trains in addition to A and B, ``modules_to_save``
# and biases, and knows no keys but those of linear layers and embeddings.
_KEY = re.compile(r"(?P<name>.+)\.lora_(?:(?P<plain>[AB])\.weight|embedding_(?P<embedding>[AB]))")


def _for_vllm(
    found: Stored, record: AdapterRecord, config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """What to write for vLLM.

    Args:
        found: The adapter as PEFT stores it.
        record: Its record.
        config: Its configuration for PEFT.

    Returns:
        Tensors by key, without the prefix, and the configuration.

    Raises:
        CheckpointError: If vLLM would refuse it or leave part of it out: all of that is named.
    """
    problems = list(dict.fromkeys(_problems(found, record)))
    if problems:
        raise CheckpointError(
            "vLLM cannot serve this adapter; merge it into the model, or save it without vllm=True:\n  "
            + "\n  ".join(problems)
        )
    rank = max(target.rank for target in found.targets)
    scales = {one.name: scale_of(one.rank, one.alpha, config) for one in found.targets}
    scale = max(scales.values(), key=abs)
    tensors = {
        key: _filled(key, value, rank, scales, scale) for key, value in found.tensors.items()
    }
    alpha = scale * rank
    one_for_all = dataclasses.replace(
        config,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        bias="none",
    )
    return tensors, one_for_all


def _filled(
    key: str, value: torch.Tensor, rank: int, scales: dict[str, float], scale: float
) -> torch.Tensor:
    match = _KEY.fullmatch(key)
    assert match is not None, key
    if "A" in (match["plain"], match["embedding"]):
        return nn.functional.pad(value, (0, 0, 0, rank - value.shape[0]))
    # All scales are zero if the largest is.
    factor = scales[match["name"]] / scale if scale else 1.0
    return nn.functional.pad(value, (0, rank - value.shape[1])) * factor


def _problems(found: Stored, record: AdapterRecord) -> Iterator[str]:
    for row in record.sites:
        kind = kind_of(row)
        for slot in kind.slots(row.site):
            yield f"{kind.field or 'kind'}: {row.name} has {slot.what}"
    yield from (f"modules_to_save: {name} is trained in full" for name in record.saved_modules)
    yield from (f"bias: {name} is trained" for name in record.biases)
    if record.config.init_lora_weights == "loftq":
        yield "init_lora_weights='loftq': the adapter belongs to a base that was quantized for it"
    yield from (f"{name}: PEFT has no name for this weight" for name in found.own)
    yield from _unknown_targets(found)
    if not found.targets:
        yield "there is no low-rank adapter"
    known = {target.name for target in found.targets}
    for key, value in found.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in known:
            if not any(key.startswith(f"{name}.") for name in record.saved_modules):
                yield f"{key} {list(value.shape)}: it is no factor of a layer"
        elif value.dim() != 2:
            yield f"{match['name']}: it is a convolution"


def _unknown_targets(found: Stored) -> Iterator[str]:
    attention = {one.name for one in found.joined if len(one.pairs) > 1}
    for target in found.targets:
        if target.parameter:
            yield f"{target.name}: it is a parameter, not a layer"
        elif target.name in attention:
            yield f"{target.name}: it is an nn.MultiheadAttention"
