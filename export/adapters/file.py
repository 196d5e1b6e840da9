"""``save_onnx_adapter`` and the way back: files that ONNX Runtime reads as ``onnxruntime.LoraAdapter``."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_fx.errors import CheckpointError, ConfigError, ExportError
from lora_fx.export.adapters.adapter_check import cast_to, check_values
from lora_fx.export.adapters.adapter_values import values_of_folder, values_of_model
from lora_fx.export.adapters.manifest import Manifest
from lora_fx.export.copy.twin import DTYPES, unwrapped
from lora_fx.export.ort.loading import reason_of
from lora_fx.export.ort.ports import to_runtime, to_tensor
from lora_fx.export.ort.providers import import_onnxruntime
from lora_fx.export.placement import check_target, staging, write_errors
from lora_fx.output_path import output_file

__all__ = ["manifest_of_file", "read_adapter", "save_onnx_adapter", "values_of"]

_VERSION = 1


def save_onnx_adapter(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter as an ``.onnx_adapter`` file, for exports with ``adapters="inputs"``.

    The file is whole or not there at all, also after an error. ONNX Runtime's own ``LoraAdapter`` reads
    it, too. The format has no place for a checksum: a truncated file is seen when it is loaded, and so
    are values that are not finite, but a number that changed on its way is a number like others.

    Args:
        source: A rewritten model, or an adapter folder of PEFT or lora_fx. A folder is enough by itself
            but for what depends on the base weights: DoRA, adapted parameters and attention layers, and
            starts that changed the base. Load those onto the model and give that.
        path: The file to write, with the suffix ``.onnx_adapter``.
        adapter_name: Which adapter of a model; by default the only one, or the only active one.
        base: The ``.onnx`` file that the adapter is for: it is checked against that, and has its dtypes.
        dtype: "fp32", "fp16" or "bf16", where there is no ``base``; by default that of the weights that a
            model adapts, or of the tensors of a folder.
        force: Replace an existing file.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: The folder is damaged or cannot be converted by itself, or the adapter is none
            for ``base``, or holds values that are not finite.
        ConfigError: An argument cannot mean anything, or the model has no such adapter.
        ExportError: The file exists or cannot be written (with the bytes that it takes, if the disk is
            full), or ``base`` takes no adapters.
        OutputPathError: ``path`` is a folder, or has another suffix.
        ProviderError: ONNX Runtime, which has the format, is not installed.
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
        # A gain near 1 would lose its digits.
        values = {
            name: value if name.endswith(".lora_gain") else value.to(DTYPES[dtype])
            for name, value in values.items()
        }
    broken = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{_named(source)}: {', '.join(broken[:5])} would hold values that are not finite: the adapter "
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
    """ONNX Runtime does not say why it cannot write."""
    full = shutil.disk_usage(folder).free < size
    return OSError(errno.ENOSPC if full else errno.EIO, f"ONNX Runtime fails: {reason_of(error)}")


def values_of(
    source: Any, adapter_name: str | None = None, manifest: Manifest | None = None
) -> dict[str, Tensor]:
    """The values of an adapter, wherever it is, in the dtypes of ``manifest`` where those may be chosen.

    Args:
        source: A rewritten model, an adapter folder, an ``.onnx_adapter`` file, or values by name.
        adapter_name: Which adapter of a model.
        manifest: What they are for, if it is known.

    Raises:
        CheckpointError, ConfigError, ExportError: As :func:`save_onnx_adapter`.
    """
    if adapter_name is not None and not isinstance(source, nn.Module):
        raise ConfigError(
            f"adapter_name={adapter_name!r} chooses among the adapters of a model, and this is a single "
            "adapter: leave it out"
        )
    if isinstance(source, nn.Module):
        values = values_of_model(unwrapped(source), adapter_name)
    elif isinstance(source, Mapping):
        # Not what the caller may write into later.
        return {str(name): torch.as_tensor(value).clone() for name, value in source.items()}
    elif not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"an adapter cannot be read from a {type(source).__name__}: give a rewritten model, an adapter "
            "folder, or an .onnx_adapter file"
        )
    elif Path(source).is_dir():
        values = values_of_folder(Path(source), manifest)
    else:
        return read_adapter(Path(source))
    return values if manifest is None else cast_to(manifest, values)


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The values of an ``.onnx_adapter`` file, on the CPU, with storage of their own.

    Raises:
        CheckpointError: It is missing, damaged, or no such file.
        ProviderError: ONNX Runtime is not installed.
    """
    runtime = import_onnxruntime()
    if not path.is_file():
        raise CheckpointError(
            f"there is no adapter at {path}: lora_fx.save_onnx_adapter writes one"
        )
    try:
        read = runtime.AdapterFormat.read_adapter(str(path))  # the values lie in what it has mapped
        return {name: to_tensor(value).clone() for name, value in read.get_parameters().items()}
    except Exception as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no .onnx_adapter file: write it again with "
            "lora_fx.save_onnx_adapter"
        ) from error


def manifest_of_file(path: Path) -> Manifest:
    """The adapter inputs of an ``.onnx`` file; its weights are not loaded.

    Raises:
        ExportError: It is missing, damaged, or takes no adapters.
    """
    import onnx

    if not path.is_file():
        raise ExportError(f"there is no file {path}: export a model to it first")
    try:
        properties = onnx.load(str(path), load_external_data=False).metadata_props
    except Exception as error:
        raise ExportError(f"{path} is damaged or no ONNX file: export it again") from error
    manifest = Manifest.from_metadata({one.key: one.value for one in properties})
    if manifest is None:
        raise ExportError(f"{path} takes no adapters: export it with adapters='inputs'")
    return manifest


def _named(source: object) -> str:
    return f"this {type(source).__name__}" if isinstance(source, nn.Module) else str(source)
