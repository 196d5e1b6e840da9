"""Adapter folders, read and written as PEFT does.

The names of the tensors are in :mod:`lora_fx.checkpoint.keys`. Loading is strict: every tensor of the folder
must have a slot in the model, and every slot a tensor. Otherwise nothing is changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lora_fx.adapter_files import (
    DIFFUSERS_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    read_tensors,
)
from lora_fx.adapters import (
    adapter_names,
    adapter_record,
    delete_adapter,
    put_adapter,
    the_adapter,
    with_targets,
    written_config,
)
from lora_fx.checkpoint.dialects import (
    READERS,
    Reader,
    component_of,
    for_diffusers,
    for_one_rank,
    joined_metadata,
    read_dialect,
)
from lora_fx.checkpoint.files import check_parts, has_receipt, write_folder
from lora_fx.checkpoint.joined import NOTE, note_of, parts_in, stored_targets
from lora_fx.checkpoint.keys import PREFIX, Slot
from lora_fx.checkpoint.migration import Migration, move_adapter
from lora_fx.checkpoint.receipt import judge_model, make_receipt, read_receipt
from lora_fx.checkpoint.starts import check_start, repeat_start
from lora_fx.checkpoint.state import (
    Read,
    SaveEmbeddings,
    by_hand_in,
    changed,
    deployment_in,
    fill,
    fitted,
    given_values,
    note_of_by_hand,
    note_of_deployment,
    note_of_labels,
    place_given,
    stored,
    without_prefix,
)
from lora_fx.config import (
    CONFIG_NAME,
    LoraConfig,
    judge,
    missing_adapter,
    saved_entries,
)
from lora_fx.errors import CheckpointError, ConfigError, NoMatchError, QuantizationError, some
from lora_fx.files import current
from lora_fx.formats import Deploy
from lora_fx.ir import AdapterRecord, ModelT, record_of
from lora_fx.kinds import chosen_kind, config_for
from lora_fx.methods import check_peft_type
from lora_fx.passes.capture import Frontend
from lora_fx.passes.parameters import check_alike, inside
from lora_fx.passes.pipeline import RewriteOptions, plan_model, rewrite_model
from lora_fx.runtime.modules import check_adapter_name

__all__ = [
    "Match",
    "folder_of",
    "load_adapter",
    "load_onto_empty",
    "plan_migration",
    "save_adapter",
]


_log = logging.getLogger("lora_fx")

Match = Literal["name", "graph"]
"""The way to find the matrices of a folder in a model: by PEFT's names, or by structure."""


@inside
def save_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    force: bool = True,
    format: Reader = "peft",  # noqa: A002  the word of such arguments
    component: str | None = None,
    vllm: bool = False,
    receipt: Any = None,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> Path:
    """Write an adapter as a PEFT folder, which PEFT, vLLM and :func:`load_adapter` read.

    The folder also holds the trained biases, the modules of ``modules_to_save``, and the buffers that
    training changed (batch-norm statistics). The configuration names every site in full. If the
    initialization changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), the adapter is converted to an equivalent
    one over the original base, with twice the rank. LoftQ is noted in the configuration, and the base is
    quantized again on loading.

    Parameters of the base that were unfrozen by hand are written under their own names, with a warning. So
    are those of a module that replaced a module of the base. PEFT and :func:`load_adapter` read them. To
    train them as part of an adapter, use ``modules_to_save``.

    Args:
        model: A rewritten model. With "diffusers" also several models by their parts of the pipeline
            (``{"unet": unet, "text_encoder": encoder}``), whose adapters go into a single file.
        directory: The folder to write; created if it is missing. An adapter that is not called "default" goes
            into a subfolder of its name.
        adapter_name: The adapter; by default the only one, or the only active one.
        force: False to refuse a folder with an adapter instead of replacing the adapter, as PEFT does.
        format: The reader of the files. "peft" is for PEFT, and for vLLM if all layers have the same rank and
            alpha. "vllm" and "gguf-ready" (llama.cpp's converter) are for readers that ignore patterns: all
            layers get the same rank and alpha, and B absorbs the difference. PEFT reads that as well.
            "diffusers" is for ``load_lora_weights`` of a pipeline: the file
            ``pytorch_lora_weights.safetensors``. :func:`load_adapter` reads all formats.
        component: With "diffusers", the model's part of the pipeline: "unet", "transformer", "text_encoder",
            "text_encoder_2" or "text_encoder_3". Models of diffusers do not need it.
        vllm: The same as ``format="vllm"``.
        receipt: Inputs of the model, a tensor or tensors by argument. The adapter's effect on them is saved
            with it, and ``lora-fx verify`` checks that a runtime or a server reproduces it.
        save_embedding_layers: True to write the weights of the embedding and the head of a transformers model
            as well. By default, as in PEFT, they are written if a layer called ``embed_tokens`` or
            ``lm_head`` is adapted. They are also written if the vocabulary differs from the base's
            ``config.json`` (if that is on this machine). For vLLM the default is False.

    Returns:
        The written folder.

    Raises:
        ConfigError: If the model has no such adapter, several could be meant, or its start still waits for
            data. If the format or component does not exist, or several models are given for another format or
            with ``receipt``.
        CheckpointError: If the folder has an adapter and ``force`` is False, or an adapter of another format.
            If the model is on the meta device, the reader would refuse the adapter or a part of it, or the
            files cannot be written (a full disk). The folder is unchanged then.
    """
    reader = _reader(format, component, vllm=vllm)
    if isinstance(directory, nn.Module):
        raise ConfigError(
            f"directory is a {type(directory).__name__}: the model comes first, then the folder: "
            "lora_fx.save_adapter(model, folder)"
        )
    if isinstance(model, Mapping):
        if reader != "diffusers" or component is not None or receipt is not None or not model:
            raise ConfigError(
                "several models, by the part of a pipeline, are for format='diffusers', without component= "
                "and receipt=: save each model by itself"
            )
        adapter_name = the_adapter(next(iter(model.values())), adapter_name)
        folder = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)
        saved = [_of_component(module, adapter_name, part) for part, module in model.items()]
        joined = {key: value for tensors, _ in saved for key, value in tensors.items()}
        write_folder(
            folder, joined, None, notes=joined_metadata(notes for _, notes in saved), force=force
        )
        return folder
    adapter_name = the_adapter(model, adapter_name)
    folder = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)
    if reader == "diffusers":
        tensors, notes = _of_component(model, adapter_name, component)
        check_parts(folder, tensors)
        adapter_receipt = (
            None if receipt is None else make_receipt(model, adapter_name, receipt, tensors)
        )
        write_folder(folder, tensors, None, notes=notes, receipt=adapter_receipt, force=force)
        return folder
    record = _initialized(model, adapter_name)
    if reader != "peft" and save_embedding_layers == "auto":
        save_embedding_layers = False
    values, config, notes = folder_of(
        model, record, adapter_name, save_embedding_layers, reader=reader, folder=folder
    )
    tensors = {PREFIX + key: value for key, value in values.items()}
    adapter_receipt = (
        None if receipt is None else make_receipt(model, adapter_name, receipt, tensors)
    )
    write_folder(folder, tensors, config, notes=notes, receipt=adapter_receipt, force=force)
    return folder


@inside
def _of_component(
    model: nn.Module, adapter_name: str, component: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the contents of a diffusers file for a single model: tensors by key, and metadata."""
    record = _initialized(model, adapter_name)
    part = component_of(model, component)
    adapter = stored(model, record, adapter_name, False)
    config = written_config(model, record, adapter.targets)
    return for_diffusers(adapter, record, config, part)


def _initialized(model: nn.Module, adapter_name: str) -> AdapterRecord:
    record = adapter_record(model, adapter_name)
    if not record.initialized:
        start = record.config.init_lora_weights
        raise ConfigError(
            f"adapter {adapter_name!r}: init_lora_weights={start!r} waits for data: "
            "call lora_fx.initialize(model, batches) before training"
        )
    return record


def _reader(named: Reader, component: str | None, *, vllm: bool) -> Reader:
    if named not in READERS:
        raise ConfigError(f"format={named!r}: it is one of {', '.join(map(repr, READERS))}")
    if vllm and named not in ("peft", "vllm"):
        raise ConfigError(f"vllm=True and format={named!r}: give format alone")
    if component is not None and named != "diffusers":
        raise ConfigError("component= says which part of a pipeline it is: give format='diffusers'")
    return "vllm" if vllm else named


def folder_of(
    model: nn.Module,
    record: AdapterRecord,
    adapter_name: str,
    save_embedding_layers: SaveEmbeddings = "auto",
    *,
    reader: Reader = "peft",
    folder: Path | str = "save_pretrained",
) -> tuple[Mapping[str, torch.Tensor], LoraConfig, dict[str, str]]:
    """Return the contents of an adapter folder: tensors without PEFT's prefix, configuration, metadata.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter_name: Its name.
        save_embedding_layers: As for :func:`save_adapter`.
        reader: "peft", "vllm" or "gguf-ready".
        folder: The name of the folder in warnings.

    Raises:
        CheckpointError: As :func:`save_adapter`.
    """
    adapter = stored(model, record, adapter_name, save_embedding_layers)
    config = written_config(model, record, adapter.targets)
    if adapter.own:
        _log.warning(
            "PEFT cannot load the adapters of %s from the folder %s, because it has no names for these "
            "weights. lora_fx loads them",
            ", ".join(adapter.own),
            folder,
        )
    if adapter.by_hand:
        _log.warning(
            "%s: these parameters are trained, and no adapter trains them: they are saved beside it, in "
            "full. modules_to_save makes them part of an adapter: %s",
            folder,
            some(sorted(adapter.by_hand)),
        )
    if chosen_kind(config).reads_tokens and config.task_type != "CAUSAL_LM":
        _log.warning(
            "%s: PEFT applies this adapter only with task_type='CAUSAL_LM', and computes the base without "
            "it: set it in the configuration before the rewrite",
            folder,
        )
    if config.lora_dropout != record.config.lora_dropout:
        _log.warning(
            "%s: PEFT allows no dropout where it adapts a parameter (%s): lora_dropout=%g was left out of "
            "the configuration",
            folder,
            ", ".join(config.target_parameters or ()),
            record.config.lora_dropout,
        )
    values, notes = adapter.tensors, note_of(adapter.joined)
    notes |= note_of_by_hand({*adapter.by_hand, *adapter.from_folder})
    if reader != "peft":
        # With a common rank the parts' own ranks are lost, so loading adapts the whole as a single site.
        (values, config), notes = for_one_rank(adapter, record, config, reader), {}
    return values, config, notes | note_of_deployment(record) | note_of_labels(model)


@inside
def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    component: str | None = None,
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    deploy: Deploy | str | Literal["saved"] | None = "saved",
    match: Match = "name",
    source: nn.Module | None = None,
) -> ModelT:
    """Load an adapter folder of PEFT or lora_fx, or an adapter file of diffusers or kohya.

    Args:
        model: A model that is not rewritten, which is not changed, or a rewritten model. If the latter has an
            adapter of this name, its values are replaced, and the shapes have to match. Otherwise the adapter
            is added, and :func:`lora_fx.set_adapter` activates it.
        directory: A local folder. If the adapter is not called "default", its subfolder of that name is used
            if it exists. Or a file, ``.safetensors``, with the names of diffusers or of kohya's scripts
            (``lora_unet_…``), or the folder of ``pytorch_lora_weights.safetensors``.
        adapter_name: The name for the adapter, because the folder has none.
        component: The model's part of a pipeline ("unet", "transformer", "text_encoder", "text_encoder_2",
            "text_encoder_3"), if several parts of a file fit the model. Other parts of the file are ignored.
        example_inputs: As for :func:`lora_fx.rewrite`, if the model is not rewritten. An adapter may need
            them again if it was trained on a model that was rewritten with them.
        frontend: As for :func:`lora_fx.rewrite`.
        deploy: As for :func:`lora_fx.rewrite`, if the model is not rewritten. By default the storage that the
            adapter was trained for, which the folder names. None loads the adapter without rounding.
        match: "name" for an adapter of this model. "graph" for an adapter with other names: from an older
            version of transformers, from a wrapped model, or with experts or projections stored in another
            way. The new name of each matrix is logged (:func:`lora_fx.plan_migration`). If the folder has a
            receipt, the outputs are compared with it.
        source: With "graph", the model that the adapter was trained on, if you have it. It may be on the meta
            device. It tells the parts of fused matrices, and the order of execution.

    Returns:
        A model with the adapter, as from :func:`lora_fx.rewrite`: a new one, or ``model`` itself if it is
        rewritten. It can be trained further: ``inference_mode``, which PEFT sets in every folder, is ignored.
        Values are cast to the dtypes of the model.

    Raises:
        CheckpointError: If the folder or a file is missing or damaged, is no LoRA adapter, or is a pickle
            that could run code. If it does not fit the model: the error names every tensor that is missing,
            unexpected or of another shape. With "graph": if a name is ambiguous, or the outputs are not those
            of the receipt. Nothing was changed then.
        ConfigError: If the adapter needs a feature that lora_fx does not have, or capture arguments are given
            for a rewritten model. If the model cannot have the storage that the adapter was trained for.
        CaptureError: If the model cannot be captured.
    """
    check_adapter_name(adapter_name)
    if match not in ("name", "graph"):
        raise ConfigError(f"match={match!r}: it is 'name' or 'graph'")
    if source is not None and match != "graph":
        raise ConfigError("source= is the model of an adapter with other names: give match='graph'")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model must be a torch.nn.Module, found {type(model).__name__}: the model comes first, then the "
            "folder: lora_fx.load_adapter(model, folder)"
        )
    how: dict[str, Any] = {"example_inputs": example_inputs, "frontend": frontend}
    fit = None if match == "name" else functools.partial(move_adapter, source=source)
    return _load(model, directory, adapter_name, component, how, deploy, fit=fit)


@inside
def plan_migration(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    source: nn.Module | None = None,
    example_inputs: Any = None,
) -> Migration:
    """Return how ``load_adapter(..., match="graph")`` would map the matrices of an adapter to a model.

    The adapter may be of another model, or of another version of the model. Nothing is changed.

    Args:
        model: The model to load it on, perhaps on the meta device.
        directory: As for :func:`load_adapter`.
        adapter_name: As for :func:`load_adapter`.
        source: As for :func:`load_adapter`.
        example_inputs: As for :func:`load_adapter`.

    Returns:
        A row for each matrix of the adapter, with the reason and the confidence. ``str()`` is a table.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    folder = _folder(directory, adapter_name)
    tensors, config, _ = _read(folder, model, None)
    return move_adapter(
        model,
        tensors,
        config,
        source=source,
        example_inputs=example_inputs,
        written=_entries(folder),
    )


@inside
def load_onto_empty(
    model: nn.Module,
    directory: str | os.PathLike[str],
    read: Read,
    *,
    match: Match = "name",
    source: nn.Module | None = None,
) -> nn.Module:
    """Load an adapter onto a model on the meta device. The adapter gets its values, and the base gets none.

    Args:
        model: A model on the meta device that is not rewritten; it is not changed.
        directory: As for :func:`load_adapter`.
        read: A function that returns the values of a weight of the base, or None if they are unknown. Copies
            of weights in the folder are compared with them.
        match: As for :func:`load_adapter`.
        source: As for :func:`load_adapter`.

    Raises:
        CheckpointError: As :func:`load_adapter`.
        ConfigError: As :func:`load_adapter`.
        CaptureError: As :func:`load_adapter`.
    """
    how: dict[str, Any] = {"example_inputs": None, "frontend": "auto"}
    fit = None if match == "name" else functools.partial(move_adapter, source=source)
    return _load(model, directory, "default", None, how, "saved", read, fit)


def _load(
    model: ModelT,
    directory: str | os.PathLike[str],
    adapter_name: str,
    component: str | None,
    how: dict[str, Any],
    deploy: Deploy | str | Literal["saved"] | None,
    read: Read | None = None,
    fit: Callable[..., Migration] | None = None,
) -> ModelT:
    """Load an adapter folder or file onto a model; see :func:`load_adapter`.

    With ``fit``, the tensors of the folder are renamed first, for ``match="graph"``.
    """
    folder = _folder(directory, adapter_name)
    tensors, config, metadata = _read(folder, model, component)
    if fit is not None:
        tensors, config, metadata = _migrated(folder, model, tensors, config, metadata, how, fit)
    _check_how(model, how, deploy)
    if not chosen_kind(config).stores:
        return _add_without_values(model, folder, config, adapter_name)
    config = config_for(config, tensors)
    known = record_of(model) is not None and adapter_name in adapter_names(model)
    if record_of(model) is None:
        targets = stored_targets(model, config, tensors, parts_in(metadata))
        exact = with_targets(config, targets, model)
        wanted = deployment_in(metadata) if deploy == "saved" else deploy
        with _noted_deployment(folder, wanted if deploy == "saved" else None):
            target = _rewritten(model, exact, tensors, folder, adapter_name, how, wanted)
    elif known:
        exact, target = config, model
    else:
        targets = stored_targets(model, config, tensors, parts_in(metadata))
        exact, target = with_targets(config, targets, model), model
        _extend(model, exact, tensors, folder, adapter_name)
    try:
        if not known:
            repeat_start(target, adapter_name, config)
            _place_base_values(target, adapter_name, tensors, metadata, folder, read)
        record = adapter_record(target, adapter_name)
        values, problems = fitted(target, record, adapter_name, tensors, config, read)
        if problems:
            remedy = _remedy(model, tensors, config, folder) if fit is None else []
            first = [_misfit(folder, model, known), *remedy]
            raise CheckpointError(
                "\n  ".join([*first, *sorted(problems), *_reasons(model, exact, how)])
            )
        before = _values_in(slot for slot, _ in values) if known and fit is not None else []
        fill(target, adapter_name, values)
        check_alike(target, record.sites, adapter_name)
        if fit is not None and read is None:
            _check_receipt(target, adapter_name, folder, before)
    except BaseException:
        if target is model and not known:
            delete_adapter(model, adapter_name)
        raise
    if deploy == "saved":
        _warn_of_deployment(folder, deployment_in(metadata), record)
    _note_stale_buffers(target, {slot.name for slot, _ in values})
    return cast("ModelT", target)


def _place_base_values(
    target: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    folder: Path,
    read: Read | None,
) -> None:
    """Give an adapter the folder's copies of base weights, if they differ from the weights of the model.

    They replace the base's weights only while the adapter is active.
    """
    record = adapter_record(target, adapter_name)
    base_values = given_values(target, record, tensors, by_hand_in(metadata), read)
    if base_values:
        _log.warning(
            "%s: the folder has other values of %s than the model: they come and go with the adapter",
            folder,
            ", ".join(base_values),
        )
    place_given(target, adapter_name, base_values, read)


def _check_how(model: nn.Module, how: Mapping[str, Any], deploy: object) -> None:
    """Raise if arguments that say how to rewrite a model are passed with a model that is rewritten."""
    if record_of(model) is None:
        return
    if how["example_inputs"] is not None or how["frontend"] != "auto":
        raise ConfigError(
            "the model is rewritten already: example_inputs and frontend say how to capture one that "
            "is not. Leave them out, or give the original model"
        )
    if deploy not in ("saved", None):
        raise ConfigError(
            f"the model is rewritten already, and deploy={deploy!r} says how to rewrite one that is not: "
            "leave it out, or give the original model"
        )


def _values_in(slots: Iterable[Slot]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(slot.tensor, slot.tensor.detach().clone()) for slot in slots]


def _migrated(
    folder: Path,
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    metadata: Mapping[str, str],
    how: Mapping[str, Any],
    fit: Callable[..., Migration],
) -> tuple[Mapping[str, torch.Tensor], LoraConfig, dict[str, str]]:
    """Return the contents of a folder after migration: with the names and forms of the given model."""
    inputs = how["example_inputs"]
    moved = fit(model, tensors, config, example_inputs=inputs, written=_entries(folder))
    moved.check()
    _log.info("%s:\n%s", folder, moved)
    notes = dict(metadata)
    if moved.changed:
        # The note about joined sites has the old names. Without the note, the whole weight is one site.
        notes.pop(NOTE, None)
        names = {move.old: move.new for move in moved.moves}
        by_hand = {names.get(name, name) for name in by_hand_in(metadata)}
        notes |= note_of_by_hand(by_hand)
    return moved.tensors, moved.config, notes


def _entries(folder: Path) -> Mapping[str, Any]:
    """Return the contents of ``adapter_config.json``; nothing for a single file of another library."""
    if not folder.is_dir():
        return {}
    entries: Mapping[str, Any] = json.loads(
        current(folder / CONFIG_NAME).read_text(encoding="utf-8")
    )
    return entries


def _check_receipt(
    model: nn.Module,
    adapter_name: str,
    folder: Path,
    before: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Check a migrated adapter: compare its outputs with the receipt of the folder, if there is one.

    Raises:
        CheckpointError: If the outputs differ from the receipt. The adapter's earlier values are restored
            first.
    """
    if not has_receipt(folder):
        return
    verdict = judge_model(model, adapter_name, read_receipt(folder))
    if verdict.applied:
        return
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
    raise CheckpointError(
        f"{folder}: the matrices fit this {type(model).__name__}, but its outputs are not those "
        f"of the adapter's receipt ({verdict}). Nothing was changed; the weights of the base, or the order "
        "of parts, differ"
    )


def _add_without_values(
    model: ModelT, folder: Path, config: LoraConfig, adapter_name: str
) -> ModelT:
    """Add an adapter that has no parameters because it only reads other adapters, such as Arrow's router.

    PEFT writes tensors into such a folder, too. It never uses them, so they are not read.

    Raises:
        CheckpointError: If the model is not rewritten, or has an adapter of this name.
    """
    if record_of(model) is None:
        raise CheckpointError(
            f"{folder}: the adapter reads other adapters ({chosen_kind(config).field}) and has no parameters "
            "of its own: load those first, under the names that it gives them, and then this one onto the "
            "same model"
        )
    if adapter_name in adapter_names(model):
        raise CheckpointError(
            f"{folder}: the model has an adapter {adapter_name!r}, and this one has no values to write into "
            "it: give another name"
        )
    put_adapter(model, config, adapter_name)
    return model


def _read(
    folder: Path, model: nn.Module, component: str | None
) -> tuple[Mapping[str, torch.Tensor], LoraConfig, dict[str, str]]:
    """Return the contents of a folder, or of a file of another library, as :func:`folder_of` does."""
    metadata: dict[str, str] = {}
    if folder.is_file():
        tensors, config = read_dialect(folder, model, component)
    elif component is not None:
        raise ConfigError(
            f"component={component!r}: {folder} is a folder of one adapter, and has no parts"
        )
    else:
        check_peft_type(folder)
        config = LoraConfig.from_pretrained(folder)
        read, metadata = read_tensors(folder)
        tensors = without_prefix(read)
    check_start(config, folder)
    return tensors, config, metadata


def _folder(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    folder = Path(directory)
    if folder.is_file() and folder.suffix in (".safetensors", ".bin"):
        beside = (
            folder.name in (WEIGHTS_NAME, PICKLE_NAME) and (folder.parent / CONFIG_NAME).is_file()
        )
        return folder.parent if beside else folder
    if not folder.is_dir():
        raise CheckpointError(missing_adapter(folder))
    if (folder / DIFFUSERS_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        return folder / DIFFUSERS_NAME
    inner = folder / adapter_name
    if adapter_name != "default" and current(inner / CONFIG_NAME).is_file():
        return inner
    return folder


def _rewritten(
    model: nn.Module,
    exact: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
    how: dict[str, Any],
    deploy: str | None,
) -> nn.Module:
    nothing = not exact.target_modules and not exact.target_parameters
    if nothing and not saved_entries(exact) and not exact.trainable_token_indices:
        names = some(sorted(tensors)) or "none"
        raise CheckpointError(
            f"{folder} holds no LoRA factor; found {len(tensors)} other tensor(s): {names}"
        )
    try:
        options = RewriteOptions(adapter_name, loaded=True, deploy=deploy)
        return rewrite_model(model, exact, options=options, **how)
    except NoMatchError as error:
        raise _matches_nothing(model, exact, tensors, folder, how, error.refused) from error


@contextlib.contextmanager
def _noted_deployment(folder: Path, name: str | None) -> Iterator[None]:
    """Add a note to an error about the storage that a folder names: how to load the adapter without it."""
    try:
        yield
    except (ConfigError, QuantizationError) as error:
        if name is not None:
            error.add_note(
                f"the adapter in {folder} was trained for {name}: load_adapter(..., deploy=None) loads it "
                "without rounding"
            )
        raise


def _warn_of_deployment(folder: Path, saved: str | None, record: AdapterRecord) -> None:
    """Log a warning if an adapter was trained for another storage than the model rounds it to."""
    own = deployment_in(note_of_deployment(record))
    if saved != own and saved is not None:
        _log.warning(
            "%s: the adapter was trained for %s, and the model %s: its outputs are others than in training. "
            "load_adapter onto the original model restores that",
            folder,
            saved,
            "does not round its weights" if own is None else f"rounds its weights to {own}",
        )


def _extend(
    model: nn.Module,
    exact: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    adapter_name: str,
) -> None:
    """Add the adapter of a folder to a rewritten model. Its values are loaded later."""
    try:
        put_adapter(model, exact, adapter_name)
    except NoMatchError as error:
        raise _matches_nothing(model, exact, tensors, folder, {}, error.refused) from error


def _matches_nothing(
    model: nn.Module,
    exact: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    how: dict[str, Any],
    refused: tuple[str, ...],
) -> CheckpointError:
    """Return the error for a folder with tensors of layers that have no operation that can be adapted.

    Args:
        model: The model.
        exact: The configuration of the folder.
        tensors: Its tensors.
        folder: The folder.
        how: Options of the rewrite.
        refused: The names of these layers; empty if they are all layers of the folder.
    """
    layers = tuple(f"{name}." for name in refused)
    keys = [key for key in sorted(tensors) if key.startswith(layers)] or sorted(tensors)
    lines = [f"unexpected: {key} {list(tensors[key].shape)}" for key in keys]
    remedy = _remedy(model, tensors, exact, folder)
    return CheckpointError(
        "\n  ".join([_misfit(folder, model), *remedy, *lines, *_reasons(model, exact, how)])
    )


def _remedy(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path
) -> list[str]:
    """Return the advice to use ``match="graph"`` if a migration would succeed; else an empty list."""
    moved = move_adapter(model, tensors, config, written=_entries(folder))
    if moved.problems or not moved.changed:
        return []
    sure = "" if moved.confidence == 1.0 else ", if it is of this model under other names"
    advice = (
        f'load_adapter(..., match="graph") loads it{sure}: {moved.changed} of its matrices have other names '
        "or another form in this model"
    )
    return [advice]


def _reasons(model: nn.Module, exact: LoraConfig, how: dict[str, Any]) -> list[str]:
    """Return the reasons why operations that a folder targets cannot be adapted, for an error."""
    if record_of(model) is not None:
        return []
    try:
        _, plan = plan_model(model, exact, **how)
    except NoMatchError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    known = {skipped.site.name: skipped.reason for skipped in plan.skipped}
    known |= {rejection.name: rejection.reason for rejection in plan.rejections}
    selected = {name for name in known if judge(name, exact).selected}
    return [f"because {name}: {known[name]}" for name in sorted(selected)]


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


def _note_stale_buffers(model: nn.Module, loaded: set[str]) -> None:
    stale = [name for name in changed(model) if name not in loaded]
    if stale:
        _log.warning(
            "these buffers, which training has changed, keep their values, since the folder does "
            "not hold them: %s. For the outputs that it had, load it onto the original model",
            ", ".join(stale),
        )
