"""Writing and reading of ``.onnx_adapter`` files, which ONNX Runtime reads as ``onnxruntime.LoraAdapter``."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fx.adapters import adapter_record, the_adapter
from lora_fx.checkpoint import UNREAD, Dense, Slot, converted, read_tensors, without_prefix
from lora_fx.config import LoraConfig, scale_for
from lora_fx.errors import CheckpointError, ConfigError, ExportError, some
from lora_fx.export.adapter_manifest import (
    SUFFIXES,
    Manifest,
    Role,
    SiteInputs,
    TokenInputs,
    cast_to,
    check_values,
    fill_tokens,
)
from lora_fx.export.copy import DTYPES, unwrapped
from lora_fx.export.factor_model import (
    check_swappable,
    flip,
    replaced_parameters,
    site_inputs,
    trained_parameters,
)
from lora_fx.export.inspection import metadata_of, read_file
from lora_fx.export.ort import to_runtime, to_tensor
from lora_fx.export.providers import import_onnxruntime, reason_of
from lora_fx.export.staging import check_target, staging, write_errors
from lora_fx.files import output_file
from lora_fx.ir import PlannedSite, join, require_record
from lora_fx.kinds import base_change, chosen_kind, kind_of, stores_product
from lora_fx.passes.parameters import (
    base_statistics,
    factor_names,
    gathered,
    own_value,
    replaceable,
    tokens_of,
    trained_by_hand,
)

__all__ = [
    "base_values",
    "manifest_of_file",
    "read_adapter",
    "save_onnx_adapter",
    "values_of",
    "values_of_model",
]


_WITHOUT_EFFECT = frozenset({*UNREAD, "num_batches_tracked"})
"""Parts of keys of an adapter folder. A tensor with such a key has no effect on the outputs."""

_WRAPPED, _TRAINED_ROWS = "base_layer", ["token_adapter", "trainable_tokens_delta"]
_ROLES: dict[str, Role] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
}
_log = logging.getLogger("lora_fx")
_KEY = re.compile(rf"(?:(?P<site>.+)\.)?(?P<kind>{'|'.join(map(re.escape, _ROLES))})")


@torch.no_grad()
def values_of_model(
    model: nn.Module, adapter_name: str | None = None, manifest: Manifest | None = None
) -> dict[str, Tensor]:
    """Return the values of an adapter by input name, in the dtype of the weights that they adapt.

    A parameter that the adapter does not train has the base's values, because the model runs the adapter
    with them.

    Args:
        model: A rewritten model.
        adapter_name: Name of the adapter; by default the only one, or the only active one.
        manifest: The manifest of the file that the adapter is for. Its parameters are returned in addition
            to those that any adapter of the model trains.

    Raises:
        ConfigError: The model has no such adapter, or the choice is ambiguous.
        ExportError: The adapter does more than add factors and replace parameters.
        CheckpointError: The model is on the meta device.
    """
    adapter = the_adapter(model, adapter_name)
    record = adapter_record(model, adapter)
    check_swappable(adapter, record)
    if by_hand := tuple(trained_by_hand(model, require_record(model))):
        _log.warning(
            "adapter %r: trained by hand beside it, and only in a file that is exported from this model: %s",
            adapter,
            some(by_hand),
        )
    slots = {}
    for row in record.sites:
        for name in factor_names(row).present:
            fqn = join(row.site.holder, name, adapter)
            slots[fqn] = Slot(fqn, fqn, model.get_parameter(fqn))
    if any(slot.tensor.is_meta for slot in slots.values()):
        raise CheckpointError("the model is on the meta device: there are no values to write")
    whole = converted(model, record, adapter, slots)
    tensors = {slot.name: gathered(slot.tensor) for slot in whole.slots.values()}
    values: dict[str, Tensor] = {}
    for row in whole.record.sites:
        values |= _site_values(model, row, adapter, tensors)
    names = dict.fromkeys(trained_parameters(require_record(model)))
    if manifest is not None:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        known |= base_statistics(model).keys()
        names |= {target.name: None for target in manifest.parameters if target.name in known}
    own = set(replaced_parameters(record))
    for name in names:
        value = own_value(model, adapter, name) if name in own else _of_base(model, name)
        values[name] = _copied(value)
    for tokens in record.tokens:
        if not tokens.tied:
            rows = _copied(tokens_of(model, tokens, adapter))
            rows = rows.to(_of_base(model, tokens.site.weight).dtype)
            values |= _token_values(tokens.name, tokens.indices, rows)
    return values


def _token_values(name: str, tokens: Sequence[int], rows: Tensor) -> dict[str, Tensor]:
    """Return the tokens, [n], and the trained rows of an embedding, [n, width], by input name."""
    names = TokenInputs(name, "", (len(rows), rows.shape[1]), 0).names
    return dict(zip(names, (torch.tensor(tokens), rows.contiguous()), strict=True))


def base_values(model: nn.Module, manifest: Manifest) -> dict[str, Tensor]:
    """Return the base's values of the parameters of a manifest by name, in their dtypes.

    Args:
        model: A rewritten model.
        manifest: The manifest of a file that was exported from it.
    """
    names = [parameter.name for parameter in manifest.parameters]
    return cast_to(manifest, {name: _copied(_of_base(model, name)) for name in names})


def _of_base(model: nn.Module, name: str) -> Tensor:
    """Return the base's value of a parameter, which an active adapter may have replaced."""
    original = require_record(model).originals.get(name)
    return replaceable(model, name) if original is None else original


def _copied(value: Tensor) -> Tensor:
    return gathered(value).detach().cpu().contiguous().clone()


def _site_values(
    model: nn.Module, row: PlannedSite, adapter: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    names, site = factor_names(row), row.site
    a, b = (tensors[join(site.holder, name, adapter)] for name in names.pair)
    if row.tied:  # the factors belong to the embedding, so A and B are swapped
        a, b = a.T, b.T
    # The original weight of the base, because the factors here include a change by the initialization.
    weight = _of_base(model, site.weight)
    if names.slots and site.quantized is None:  # a quantized weight is not a plain tensor
        weight = gathered(weight)
    slots = {name: tensors[join(site.holder, name, adapter)].flatten() for name in names.slots}
    by_role = {"A": a.double(), **kind_of(row).inputs(row, weight, a, b, slots)}
    inputs = site_inputs(model, row).inputs()
    return {
        adapter_input.name: flip(adapter_input, by_role[adapter_input.role])
        .to("cpu", getattr(torch, adapter_input.dtype))
        .contiguous()
        for adapter_input in inputs
    }


def _values_of_folder(folder: Path, manifest: Manifest | None = None) -> dict[str, Tensor]:
    """Read the values of an adapter folder by input name, in the dtype of the folder.

    Args:
        folder: An adapter folder of PEFT or lora_fx. The names of its modules must be the names of the
            sites.
        manifest: The manifest of the file, if it is known.

    Raises:
        CheckpointError: The folder is missing or damaged, or has values that no input takes, or that depend
            on the base weights.
        ConfigError: The adapter needs a feature that lora_fx does not have.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the local folder of a PEFT adapter")
    config = LoraConfig.from_pretrained(folder)
    tensors = without_prefix(read_tensors(folder)[0])
    problems = [*_unfit(config)]
    sites: dict[str, dict[Role, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        names = key.split(".")
        if names[-2:] == _TRAINED_ROWS:
            values |= _folder_tokens(".".join(names[:-2]), value, config)
            continue
        if any(name in _WITHOUT_EFFECT for name in names):
            continue
        stripped = ".".join(name for name in names if name != _WRAPPED)
        taken = manifest is not None and stripped in manifest.inputs
        if names[-2:] == [_WRAPPED, "weight"] and not taken:
            # A weight of the base, or trained by hand. Only a comparison with the base can tell which.
            problems.append(f"{key} is a weight of the base")
            continue
        if not any(part.startswith("lora_") for part in names):
            values[stripped] = value.contiguous()
            continue
        # PEFT has no name for the factors of a parameter. lora_fx keeps them in "<name>_lora".
        if match is None or _WRAPPED in names or (match["site"] or "").endswith("_lora"):
            problems.append(f"{key} is no factor of an operation")
        else:
            sites.setdefault(match["site"] or "", {})[_ROLES[match["kind"]]] = value
    if not sites and not values and not problems:
        problems.append("it holds no tensor")
    if problems:
        raise CheckpointError(
            f"{folder} cannot be converted by itself: {some(problems, between='; ')}. Load it onto its "
            "model (lora_fx.load_adapter(model, folder)) and give that instead of the folder; on the command "
            "line, name the model with --model"
        )
    known = {site.name: site for site in manifest.sites} if manifest else {}
    for name, parts in sites.items():
        try:
            values |= _folder_site(name, parts, scale_for(name, config), known.get(name))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    return values


def _unfit(config: LoraConfig) -> Iterator[str]:
    """Yield the reasons why an adapter folder cannot become an ``.onnx_adapter`` file without its model."""
    kind = chosen_kind(config)
    if kind.depends:
        yield kind.depends
    if not stores_product(kind):
        yield f"no file takes what its kind trains ({kind.name!r})"
    if config.target_parameters:
        yield "which operations read its parameters (target_parameters), only the model knows"
    if setting := base_change(config):
        yield f"its start ({setting}) changed the base weights"


def _folder_tokens(name: str, rows: Tensor, config: LoraConfig) -> dict[str, Tensor]:
    """Return the tokens and the trained rows of an embedding in an adapter folder, by input name.

    Raises:
        CheckpointError: The configuration has another number of tokens than ``rows``.
    """
    chosen = config.trainable_token_indices
    if isinstance(chosen, Mapping):
        ends = [key for key in chosen if name == key or name.endswith(f".{key}")]
        chosen = chosen[max(ends, key=len)] if ends else ()
    indices = list(chosen or ())
    if len(indices) != len(rows):
        raise CheckpointError(
            f"{name} has {len(rows)} trained rows, and trainable_token_indices names {len(indices)} tokens: "
            "save the adapter again"
        )
    return _token_values(name, indices, rows)


def _folder_site(
    name: str, parts: dict[Role, Tensor], scale: float, known: SiteInputs | None
) -> dict[str, Tensor]:
    if not {"A", "B"} <= parts.keys():
        lacks = "B" if "A" in parts else "A"
        raise CheckpointError(f"{name} lacks its factor {lacks}: save the adapter again")
    a, b = parts["A"], parts["B"]
    _check_pair(name, a, b)
    conv = a.dim() > 2
    if conv:
        groups = known.groups if known else len(a) // max(1, parts["B"].shape[1])
        if groups > 1 and (known is None or a.shape[1] != known.a[1]):
            a = _grouped(name, a, groups)
    values = {}
    for role, value in {**parts, "A": a}.items():
        # In double precision, so that the scaled value is rounded only once.
        scaled = value if role == "A" else (value.double() * scale).to(value.dtype)
        turned = scaled if conv or role == "bias" else scaled.T
        values[join(name, SUFFIXES[role])] = turned.contiguous()
    return values


def _check_pair(name: str, a: Tensor, b: Tensor) -> None:
    fits = a.dim() == b.dim() >= 2 and (a.dim() > 2 or a.shape[0] == b.shape[1])
    if not fits or not (a.is_floating_point() and b.is_floating_point()):
        raise CheckpointError(
            f"{name} has A {list(a.shape)} of {a.dtype} and B {list(b.shape)} of {b.dtype}: they are no pair "
            "of factors [r, in] and [out, r]"
        )


def _grouped(name: str, a: Tensor, groups: int) -> Tensor:
    """Convert PEFT's dense A of a convolution to A of a grouped convolution."""
    try:
        return Dense(groups).decode(a)
    except CheckpointError as error:
        raise CheckpointError(f"{name}.lora_A.weight {error}") from error


_VERSION = 1


def save_onnx_adapter(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    force: bool = True,
) -> Path:
    """Write an adapter as an ``.onnx_adapter`` file, for exports with ``adapters="inputs"``.

    The file is written completely or not at all, even after an error. ONNX Runtime's own ``LoraAdapter``
    reads it, too. The format has no checksum: loading detects a truncated file and values that are not
    finite, but no other corrupted values.

    Args:
        source: A rewritten model, or an adapter folder of PEFT or lora_fx. A folder does not suffice if the
            adapter depends on the base weights: kinds with a magnitude, adapted parameters and attention
            layers, and initializations that changed the base. Load such a folder onto the model, and pass
            the model.
        path: The file to write, with the suffix ``.onnx_adapter``.
        adapter_name: Name of the adapter of a model; by default the only one, or the only active one.
        base: The ``.onnx`` file for the adapter. The adapter is checked against it, and gets its dtypes.
        dtype: "fp32", "fp16" or "bf16", if there is no ``base``. By default the dtype of the weights that a
            model adapts, or of the tensors of a folder.
        force: False to refuse an existing file instead of replacing it.

    Returns:
        The written file.

    Raises:
        CheckpointError: The folder is damaged or needs its model, the adapter does not fit ``base``, or it
            has values that are not finite.
        ConfigError: An argument is not valid, or the model has no such adapter.
        ExportError: The file cannot be written (with the required bytes, if the disk is full), or
            ``base`` takes no adapters.
        OutputPathError: ``path`` is a folder, has another suffix, or exists and ``force`` is False.
        ProviderError: ONNX Runtime, which writes the format, is not installed.
    """
    target = output_file(path, (".onnx_adapter",))
    if base is not None and dtype is not None:
        raise ConfigError(
            "base and dtype were both given: the file of base says which dtype it takes"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown: give one of {', '.join(DTYPES)} or None")
    check_target(target, force=force)
    runtime = import_onnxruntime()
    manifest = None if base is None else manifest_of_file(Path(base))
    values = values_of(source, adapter_name, manifest)
    if manifest is not None:
        check_values(manifest, values, _named(source))
    elif dtype is not None:
        # A gain keeps its dtype, because half precision cannot hold small differences from 1.
        values = {
            name: value.to(DTYPES[dtype])
            if value.is_floating_point() and not name.endswith(f".{SUFFIXES['gain']}")
            else value
            for name, value in values.items()
        }
    broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{_named(source)}: {some(broken)} would hold values that are not finite: the adapter "
            "is broken, or too large for its dtype"
        )
    form = runtime.AdapterFormat()
    form.set_adapter_version(_VERSION)
    form.set_model_version(_VERSION)
    form.set_parameters({name: to_runtime(runtime, value) for name, value in values.items()})
    size = sum(value.nbytes for value in values.values())
    with staging(target) as stage, write_errors(target, size):
        try:
            form.export_adapter(str(stage.model))
        except RuntimeError as error:
            raise _write_error(error, stage.folder, size) from error
        stage.commit(force=force)
    return target


def _write_error(error: RuntimeError, folder: Path, size: int) -> OSError:
    """Return the ``OSError`` of a failed write. ONNX Runtime gives no reason, so check for a full disk."""
    full = shutil.disk_usage(folder).free < size
    return OSError(errno.ENOSPC if full else errno.EIO, f"ONNX Runtime fails: {reason_of(error)}")


def values_of(
    source: Any, adapter_name: str | None = None, manifest: Manifest | None = None
) -> dict[str, Tensor]:
    """Return the values of an adapter from any source.

    Values of a model or a folder are cast to the dtypes of ``manifest``. All others keep their dtypes.

    Args:
        source: A rewritten model, an adapter folder, an ``.onnx_adapter`` file, or values by name.
        adapter_name: Name of the adapter of a model.
        manifest: The manifest of the file for the adapter, if it is known.

    Raises:
        CheckpointError, ConfigError, ExportError: As in :func:`save_onnx_adapter`.
    """
    if adapter_name is not None and not isinstance(source, nn.Module):
        raise ConfigError(
            f"adapter_name={adapter_name!r} chooses among the adapters of a model, and this is a single "
            "adapter: leave it out"
        )
    if isinstance(source, nn.Module):
        values = values_of_model(unwrapped(source), adapter_name, manifest)
    elif isinstance(source, Mapping):
        # Copied, because the caller may write into the tensors later.
        return {str(name): torch.as_tensor(value).clone() for name, value in source.items()}
    elif not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"an adapter cannot be read from a {type(source).__name__}: give a rewritten model, an adapter "
            "folder, or an .onnx_adapter file"
        )
    elif Path(source).is_dir():
        values = _values_of_folder(Path(source), manifest)
    else:
        return read_adapter(Path(source))
    return values if manifest is None else fill_tokens(manifest, cast_to(manifest, values))


def read_adapter(path: Path) -> dict[str, Tensor]:
    """Read the values of an ``.onnx_adapter`` file as copies on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or not an ``.onnx_adapter`` file.
        ProviderError: ONNX Runtime is not installed.
    """
    runtime = import_onnxruntime()
    if not path.is_file():
        raise CheckpointError(
            f"there is no adapter at {path}: lora_fx.save_onnx_adapter writes one"
        )
    try:
        adapter = runtime.AdapterFormat.read_adapter(str(path))  # it owns the memory of the values
        return {name: to_tensor(value).clone() for name, value in adapter.get_parameters().items()}
    except Exception as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no .onnx_adapter file: write it again with "
            "lora_fx.save_onnx_adapter"
        ) from error


def manifest_of_file(path: Path) -> Manifest:
    """Read the manifest of adapter inputs from an ``.onnx`` file. Its weights are not loaded.

    Raises:
        ExportError: The file is missing, damaged, or takes no adapters.
    """
    manifest = Manifest.from_metadata(metadata_of(read_file(path)))
    if manifest is None:
        raise ExportError(f"{path} takes no adapters: export it with adapters='inputs'")
    return manifest


def _named(source: object) -> str:
    return f"this {type(source).__name__}" if isinstance(source, nn.Module) else str(source)
