"""Weights in a GGUF file of llama.cpp, which are read and dequantized one at a time.

transformers knows the names of a model's tensors in such a file, and how llama.cpp has changed them: it
reorders the rows of queries and keys, for example. gguf, the package of llama.cpp, decodes the blocks.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.converted_files import ConvertedFiles, converted, is_converted
from lora_fx.errors import CheckpointError
from lora_fx.extras import check_installed, is_installed, load_optional
from lora_fx.files import WeightFiles

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["GgufFile", "check_gguf", "check_rope", "is_gguf", "open_gguf", "weight_files"]


def is_gguf(path: Path) -> bool:
    """Return True if a path names a GGUF file. The file need not exist."""
    return path.suffix.lower() == ".gguf"


def weight_files(path: Path, model: nn.Module) -> WeightFiles:
    """Return the weights of a model in a folder, a safetensors file or a GGUF file.

    Raises:
        CheckpointError: If there are no files, or a file is damaged or cannot be read.
    """
    if is_gguf(path):
        return GgufFile(path, model)
    return ConvertedFiles(path, model) if is_converted(model) else WeightFiles(path)


def check_gguf(path: Path) -> None:
    """Raise unless a path is a GGUF file and the package gguf is installed. Only the first bytes are read.

    Raises:
        CheckpointError: If the file cannot be read or is not GGUF, or the package is missing.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): give an existing file") from error
    if start != b"GGUF":
        raise CheckpointError(
            f"{path} is no GGUF file, which begins with GGUF: copy it again, or give the right file"
        )
    check_installed(["gguf"], str(path), "lora-fx[quant]", error=CheckpointError)


def open_gguf(path: Path) -> Any:
    """Return gguf's reader of a file, which has its metadata and a memory map of its tensors.

    Raises:
        CheckpointError: If gguf is not installed, or the file is damaged, not GGUF, or only a part of a
            model.
    """
    check_gguf(path)
    gguf = load_optional("gguf", str(path), "lora-fx[quant]", error=CheckpointError)
    try:
        reader = gguf.GGUFReader(path)
        parts = reader.fields.get("split.count")
        parts = parts.contents() if parts is not None else 1
    except Exception as error:
        # gguf does not check what it reads: a damaged file raises errors of many types.
        raise CheckpointError(f"{path} is truncated or damaged ({error}): copy it again") from error
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model, which transformers does not read: join them with "
            "llama.cpp's llama-gguf-split --merge"
        )
    return reader


def check_rope(path: Path, reader: Any, config: Any) -> None:
    """Raise if a file scales rotary positions, and the configuration of the model does not.

    transformers (5.24) does not read the scaling of most architectures, and would compute wrong positions.

    Args:
        path: The file.
        reader: The reader of the file.
        config: The configuration of the model.

    Raises:
        CheckpointError: If the file scales rotary positions, and the configuration does not.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)] or [ropes]
    if any(rope.get("rope_type", "default") != "default" for rope in nested):
        return
    factors = [t.name for t in reader.tensors if re.match(r"rope_(freqs|factors)", t.name)]
    kinds = [
        f"{key} = {field.contents()}"
        for key, field in reader.fields.items()
        if key.endswith(".rope.scaling.type") and field.contents() != "none"
    ]
    if factors or kinds:
        raise CheckpointError(
            f"{path} scales rotary positions ({', '.join([*kinds, *factors])}), and transformers does not "
            "read that from the file: take the configuration from config.json of the model that was "
            "converted to GGUF (the command line reads it from the folder of the file)"
        )


class GgufFile(WeightFiles):
    """The tensors of a model in a GGUF file, without loading them."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        """Read the names and the sizes of the tensors.

        Args:
            path: The file.
            model: A model of transformers, which knows the names of its parameters in the file.

        Raises:
            CheckpointError: If a package is missing, or the file is damaged. If transformers does not know
                how llama.cpp writes this model, or does not read the scaling of its rotary positions.
        """
        self.path = path
        reader = open_gguf(path)
        load_optional("transformers", str(path), "lora-fx[hf]", error=CheckpointError)
        config = getattr(model, "config", None)
        if config is None:
            raise CheckpointError(
                f"{path} has llama.cpp's names of tensors, and {type(model).__name__} is no model of "
                "transformers, which knows them: give safetensors"
            )
        check_rope(path, reader, config)
        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        field = reader.fields.get("general.architecture")
        architecture = "" if field is None else field.contents()
        try:
            convert = _by_conversions if _is_converted(architecture) else _by_processor
            targets, self._convert = convert(path, reader, architecture, model)
        except Exception as error:
            # transformers raises errors of several types for a model that it does not know.
            raise CheckpointError(
                f"{path} has the architecture {architecture!r}, which transformers does not read as a "
                f"{type(model).__name__} ({error}): give the safetensors that it was made of"
            ) from error
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        known = model.state_dict().keys()
        self._sources: dict[str, list[str]] = defaultdict(list)
        for name in sizes:
            target = targets[name]
            left_out = name.startswith("rope_") or any(re.search(key, target) for key in ignored)
            if target in known or not left_out:
                self._sources[target].append(name)
        self._sizes = {
            key: sum(sizes[name] for name in names) for key, names in self._sources.items()
        }

    @property
    def names(self) -> Iterable[str]:
        """The names of the file's tensors in the model. A tensor that the model lacks has its GGUF name."""
        return self._sources.keys()

    def _objection(self, key: str, wanted: torch.Tensor) -> str | None:
        # Conversions may change shapes and values, but not the number of values.
        if self._sizes[key] == wanted.numel():
            return None
        return f"has {self._sizes[key]} values there and {wanted.numel()} in the model"

    def _read(self, key: str) -> torch.Tensor:
        try:
            return self._convert(key, self._sources[key])
        except (OSError, NotImplementedError, ValueError, KeyError) as error:
            names = ", ".join(self._sources[key])
            raise CheckpointError(f"{names} cannot be read from {self.path} ({error!r})") from error


_Converter = tuple[Mapping[str, str], Callable[[str, Sequence[str]], "torch.Tensor"]]
"""A mapping from names in the file to names in the model, and a function that reads one parameter."""


def _by_processor(path: Path, reader: Any, architecture: str, model: nn.Module) -> _Converter:
    """Return the names and the reader of parameters, for an architecture with a ``TensorProcessor``."""
    import gguf
    import numpy as np
    import torch
    from transformers import modeling_gguf_pytorch_utils as legacy

    settings = legacy.load_gguf_checkpoint(path)["config"]
    processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config=settings)
    # Pass gguf's name of the architecture, not transformers': a Mistral, for example, is a "llama".
    names = legacy.get_gguf_hf_weights_map(model, processor, architecture)
    # A memory map would count as memory of this process, so each read opens the file.
    stored = {
        tensor.name: (
            tensor.tensor_type,
            tensor.data.dtype,
            tensor.data.shape,
            int(tensor.data_offset),
        )
        for tensor in reader.tensors
    }

    def convert(key: str, sources: Sequence[str]) -> torch.Tensor:
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for name in sources:
            kind, dtype, shape, offset = stored[name]
            blocks = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
            result = processor.process(
                weights=gguf.dequantize(blocks, kind),
                name=name,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
        if result.name is None:  # experts: the processor joins their parts in ``parsed``
            return parsed["tensors"][key]
        return torch.from_numpy(np.ascontiguousarray(result.weights))

    # ``names`` lists the experts without ".weight", because their names in the model have no such ending.
    keys = {name: name if name in names else name.removesuffix(".weight") for name in stored}
    return {name: names.get(key, name) for name, key in keys.items()}, convert


def _is_converted(architecture: str) -> bool:
    """Return True if transformers reads an architecture by conversions of weights (5.24: Qwen3.5, LFM2)."""
    if not is_installed("transformers.integrations.gguf"):
        return False
    from transformers.integrations.gguf import utils

    return bool(utils.is_gguf_arch_supported(architecture))


def _by_conversions(path: Path, reader: Any, architecture: str, model: nn.Module) -> _Converter:
    """Return the names and the reader of parameters, for an architecture with weight conversions."""
    import torch
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import utils
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

    header = GgufHeader.from_file(str(path))
    mapping = utils.get_gguf_conversion_mapping(architecture, model.config)
    quantized, *_ = utils.get_gguf_plan(header, mapping)
    mapping = utils.add_gguf_load_ops(mapping, quantized, header, torch.float32)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    renamed = {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        for name in header.ggml_types
    }

    def convert(key: str, sources: Sequence[str]) -> torch.Tensor:
        tensors = load_gguf_state_dict(header)
        loads = {
            name: (renamed[name][1], functools.partial(tensors[name].__getitem__, ...))
            for name in sources
        }
        return converted(by_pattern[renamed[sources[0]][1]], key, loads, model)

    return {name: target for name, (target, _) in renamed.items()}, convert
