"""Adapter files of other libraries: diffusers and kohya are read; vLLM, llama.cpp and diffusers are written.

=============  ==================================================================================
PEFT           a folder; every adapter that has a name in PEFT
vLLM           a folder with one rank and one alpha, since vLLM reads no pattern. Scales are in B
llama.cpp      the same: its converter reads ``lora_alpha`` and the rank of each A, nothing else
diffusers      ``pytorch_lora_weights.safetensors``: keys begin with the part of the pipeline
               (``unet.``), and the metadata ``lora_adapter_metadata`` is the configuration. Scales
               are in B, and each alpha is the rank: diffusers before 0.33 reads no metadata
kohya          a file with keys of ``lora_unet_`` (LyCORIS: ``lycoris_``) and the layer's name, in
               which ``.`` became ``_``. Each layer has a tensor ``alpha``. Read only; used by
               kohya's scripts and ComfyUI
=============  ==================================================================================

Sources: vLLM's ``lora/peft_helper.py``, llama.cpp's ``convert_lora_to_gguf.py``, diffusers'
``loaders/lora_base.py`` and ``utils/state_dict_utils.py``, kohya's ``networks/lora.py``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn

from lora_fx.adapter_files import read_file
from lora_fx.adapters import Target, with_patterns
from lora_fx.checkpoint.state import Stored
from lora_fx.config import LoraConfig, alpha_for, scale_of
from lora_fx.errors import CheckpointError, ConfigError, some
from lora_fx.ir import AdapterRecord
from lora_fx.kinds import kind_of, stores_product
from lora_fx.methods import (
    CONVERTER,
    PARTS,
    check_is_lora,
    check_part,
    lora_role,
    place_layers,
)
from lora_fx.passes.graph import original_class
from lora_fx.passes.parameters import base_modules

__all__ = [
    "DIFFUSERS_METADATA",
    "READERS",
    "Reader",
    "component_of",
    "for_diffusers",
    "for_one_rank",
    "joined_metadata",
    "read_dialect",
]

_log = logging.getLogger("lora_fx")

Reader = Literal["peft", "vllm", "gguf-ready", "diffusers"]
READERS: Final = ("peft", "vllm", "gguf-ready", "diffusers")

DIFFUSERS_METADATA: Final = "lora_adapter_metadata"

# --- writing --------------------------------------------------------------------------------------

# vLLM and llama.cpp read PEFT's folders in part. They take ``lora_alpha`` for every layer and read no
# pattern. So r is the highest rank, smaller A and B are padded with zeros, and B is multiplied by the ratio
# of the layer's scale to the common scale. They refuse ``modules_to_save``, biases, and any tensor that a
# kind trains in addition to A and B. They know only the keys of linear layers and embeddings.
_KEY = re.compile(r"(?P<name>.+)\.lora_(?:(?P<plain>[AB])\.weight|embedding_(?P<embedding>[AB]))")
_REFUSALS = {
    "vllm": "vLLM cannot serve this adapter",
    "gguf-ready": "llama.cpp cannot convert this adapter",
    "diffusers": "diffusers cannot load this adapter",
}


def for_one_rank(
    stored: Stored, record: AdapterRecord, config: LoraConfig, reader: Reader
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return the files for a reader that knows a single rank and alpha: vLLM, llama.cpp.

    Args:
        stored: The adapter as PEFT stores it.
        record: The adapter's record.
        config: The adapter's configuration for PEFT.
        reader: "vllm" or "gguf-ready".

    Returns:
        Tensors by key, without the prefix, and the configuration.

    Raises:
        CheckpointError: If the reader would refuse the adapter or leave part of it out. The error names all
            problems.
    """
    known = {target.name for target in stored.targets}
    problems = [*_of_kinds(record), *_in_full(stored, record), *_unknown_targets(stored)]
    for key, value in stored.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in known:
            if not any(key.startswith(f"{name}.") for name in record.saved_modules):
                problems.append(f"{key} {list(value.shape)}: it is no factor of a layer")
        elif value.dim() != 2:
            problems.append(f"{match['name']}: it is a convolution")
    _refuse(problems, reader)
    rank = max(target.rank for target in stored.targets)
    scales = {target.name: scale_of(target.rank, target.alpha, config) for target in stored.targets}
    scale = max(scales.values(), key=abs)
    tensors = {
        key: _filled(key, value, rank, scales, scale) for key, value in stored.tensors.items()
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
    key: str, value: Tensor, rank: int, scales: Mapping[str, float], scale: float
) -> Tensor:
    match = _KEY.fullmatch(key)
    assert match is not None, key
    if "A" in (match["plain"], match["embedding"]):
        return nn.functional.pad(value, (0, 0, 0, rank - value.shape[0]))
    # All scales are zero if the largest is.
    factor = scales[match["name"]] / scale if scale else 1.0
    return nn.functional.pad(value, (0, rank - value.shape[1])) * factor


def for_diffusers(
    stored: Stored, record: AdapterRecord, config: LoraConfig, component: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata for diffusers.

    Scales are folded into B, so that each alpha is the rank.

    Args:
        stored: The adapter as PEFT stores it.
        record: The adapter's record.
        config: The adapter's configuration for PEFT.
        component: The part of the pipeline that the model is.

    Returns:
        Tensors by key, and the metadata of the file.

    Raises:
        CheckpointError: If diffusers would leave part of the adapter out. The error names all problems.
    """
    _refuse([*_in_full(stored, record), *_unknown_targets(stored)], "diffusers")
    scales = {target.name: scale_of(target.rank, target.alpha, config) for target in stored.targets}
    config = with_patterns(
        dataclasses.replace(config, use_rslora=False),
        [dataclasses.replace(target, alpha=float(target.rank)) for target in stored.targets],
    )
    values = {
        f"{component}.{name}": value for name, value in config.to_dict().items() if name != "seed"
    }
    # Text encoders are loaded by transformers, which looks for magnitudes by the name of the parameter and
    # silently creates new ones if none match. PEFT loads the other parts, and leaves ".weight" out.
    by_name = component.startswith("text_encoder")
    end = ".lora_magnitude_vector"
    tensors = {
        f"{component}.{key}{'.weight' if by_name and key.endswith(end) else ''}": _scaled(
            key, value, scales
        )
        for key, value in stored.tensors.items()
    }
    return tensors, {DIFFUSERS_METADATA: json.dumps(values, indent=2, sort_keys=True)}


_OF_B = re.compile(r"(?P<name>.+)\.lora_(?:B\.(?:weight|bias)|embedding_B)")


def _scaled(key: str, value: Tensor, scales: Mapping[str, float]) -> Tensor:
    """Return B or its bias times the scale of the layer; any other tensor unchanged."""
    match = _OF_B.fullmatch(key)
    if match is None:
        return value
    return (value.double() * scales[match["name"]]).to(value.dtype)


def joined_metadata(every: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join the metadata of several parts of a pipeline, for one file of diffusers."""
    values: dict[str, Any] = {}
    for metadata in every:
        values |= json.loads(metadata[DIFFUSERS_METADATA])
    return {DIFFUSERS_METADATA: json.dumps(values, indent=2, sort_keys=True)}


def _refuse(problems: Iterable[str], reader: Reader) -> None:
    problems = list(dict.fromkeys(problems))
    if problems:
        raise CheckpointError(
            f"{_REFUSALS[reader]}; merge it into the model, or save it as PEFT has it (format='peft'):\n  "
            + "\n  ".join(problems)
        )


def _of_kinds(record: AdapterRecord) -> Iterator[str]:
    for row in record.sites:
        kind = kind_of(row)
        if kind.dynamic or (kind.low_rank and not stores_product(kind)):
            yield f"{kind.field}: {row.name} is more than a product of A and B ({kind.name})"
        for slot in kind.slots(row.site):
            yield f"{kind.field}: {row.name} has {slot.what}"


def _in_full(adapter: Stored, record: AdapterRecord) -> Iterator[str]:
    yield from (f"modules_to_save: {name} is trained in full" for name in record.saved_modules)
    yield from (f"bias: {name} is trained" for name in record.biases)
    if record.config.init_lora_weights == "loftq":
        yield "init_lora_weights='loftq': the adapter belongs to a base that was quantized for it"
    yield from (f"{name}: PEFT has no name for this weight" for name in adapter.own)
    if not adapter.targets:
        yield "there is no low-rank adapter"


def _unknown_targets(adapter: Stored) -> Iterator[str]:
    attention = {joined.name for joined in adapter.joined if len(joined.pairs) > 1}
    for target in adapter.targets:
        if target.parameter:
            yield f"{target.name}: it is a parameter, not a layer"
        elif target.name in attention:
            yield f"{target.name}: it is an nn.MultiheadAttention"


# --- which part of a pipeline ---------------------------------------------------------------------


def component_of(model: nn.Module, component: str | None) -> str:
    """Return the part of a pipeline that a model is: ``component``, or by default that of the model's class.

    Raises:
        ConfigError: If there is no such part, or the class does not tell.
    """
    if component is not None:
        check_part(component)
        return component
    cls = original_class(model)
    for base in cls.__mro__:
        if base.__module__.startswith("diffusers.") and "ControlNet" not in base.__name__:
            for word, part in (
                ("UNet", "unet"),
                ("Transformer", "transformer"),
                ("DiT", "transformer"),
            ):
                if word in base.__name__:
                    return part
    raise ConfigError(
        f"format='diffusers' needs to know which part of a pipeline this {cls.__name__} is: give component= "
        f"one of {', '.join(map(repr, PARTS))}"
    )


# --- reading --------------------------------------------------------------------------------------


def read_dialect(
    path: Path, model: nn.Module, component: str | None
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Read a file of diffusers or kohya, and convert it to PEFT's tensors and configuration.

    Args:
        path: A file of tensors.
        model: The model to load the file for, rewritten or not. The layers in the file are looked up by its
            names.
        component: The part of the pipeline that the model is, if several parts of the file could fit.

    Returns:
        Tensors by PEFT's keys, without its prefix, and their configuration.

    Raises:
        CheckpointError: If the file is damaged, belongs to another method or model, or could be meant for
            several parts.
        ConfigError: If the component does not exist, or the metadata ask for a feature that lora_fx lacks.
    """
    if component is not None:
        check_part(component)
    read, metadata = read_file(path)
    check_is_lora(path, read)
    modules = dict(base_modules(model, every_name=True))
    part, names, layers = place_layers(path, _layers(path, read), modules, component)
    config = _config_in(path, metadata, part)
    tensors: dict[str, Tensor] = {}
    targets = []
    for name, roles in layers.items():
        lacking = [role for role in "AB" if role not in roles]
        if lacking:
            raise CheckpointError(f"{path}: {name} has no {' and no '.join(lacking)}")
        _check_values(path, name, roles)
        for role, value in roles.items():
            if role != "alpha":
                key, converted = _as_peft(path, name, role, value, modules[name], roles["B"])
                tensors[key] = converted
        rank = roles["A"].shape[0]
        alpha = float(roles["alpha"]) if "alpha" in roles else None
        if alpha is None:
            # Patterns match the names of the layers in the file.
            alpha = alpha_for(names[name], config) if config is not None else float(rank)
        targets.append(Target(name, rank, alpha))
    if config is None and not any("alpha" in roles for roles in layers.values()):
        _log.warning(
            "%s says nothing of alpha, neither by tensors nor in its metadata: each is taken for the rank, "
            "as diffusers does, so that B·A is added as it is. If it was trained with another, multiply "
            "the B's by alpha / r",
            path,
        )
    base = LoraConfig() if config is None else config
    if any("alpha" in roles for roles in layers.values()):
        base = dataclasses.replace(base, use_rslora=False)
    every = list(layers.values())
    base = dataclasses.replace(
        base,
        use_dora=any({"magnitude", "dora_scale"} & roles.keys() for roles in every),
        lora_bias=any("bias" in roles for roles in every),
        target_modules=tuple(layers),
        rank_pattern={},
        alpha_pattern={},
    )
    return tensors, with_patterns(base, targets)


_Layers = dict[str, dict[str, Tensor]]


def _layers(path: Path, read: Mapping[str, Tensor]) -> _Layers:
    """Group the tensors of a file by the name of their layer and by role: A, B, alpha and so on."""
    layers: _Layers = defaultdict(dict)
    unknown = []
    for key, value in read.items():
        named = lora_role(key)
        if named is None:
            unknown.append(f"{key} {list(value.shape)}")
            continue
        name, role = named
        if role in layers[name]:
            layer = name.removesuffix("|old")
            raise CheckpointError(f"{path}: {layer} has several tensors for its {role}")
        layers[name][role] = value
    if unknown:
        raise CheckpointError(
            f"{path}: these tensors are no part of a LoRA adapter of diffusers or kohya: {some(unknown)}"
        )
    if not layers:
        raise CheckpointError(f"{path} holds no tensor")
    return layers


def _check_values(path: Path, name: str, roles: Mapping[str, Tensor]) -> None:
    for role, value in roles.items():
        if role in ("A", "B") and (value.dim() < 2 or not value.is_floating_point()):
            raise CheckpointError(
                f"{path}: {role} of {name} is {value.dtype} {list(value.shape)}, and a factor is a matrix "
                "or a kernel of floating-point numbers"
            )
    alpha = roles.get("alpha")
    if alpha is None:
        return
    if alpha.numel() != 1:
        raise CheckpointError(f"{path}: alpha of {name} is {list(alpha.shape)}, not one number")
    if float(alpha) == 0:
        raise CheckpointError(
            f"{path}: alpha of {name} is 0. Kohya's scripts take that for the rank, diffusers for no "
            "adapter: write the alpha that is meant into the file"
        )


def _as_peft(
    path: Path, name: str, role: str, value: Tensor, module: nn.Module, b: Tensor
) -> tuple[str, Tensor]:
    """Convert a tensor of diffusers or kohya to PEFT's key and shape.

    A factor gets as many dimensions as the layer's weight.
    """
    dims = module.weight.dim() if isinstance(module.weight, Tensor) else 2
    dims = max(dims, 2)
    if role in ("A", "B"):
        if value.dim() == 2 < dims:
            value = value[(...,) + (None,) * (dims - 2)]
        elif dims == 2 < value.dim() and all(size == 1 for size in value.shape[2:]):
            value = value.flatten(1)
        return f"{name}.lora_{role}.weight", value.contiguous()
    if role == "bias":
        return f"{name}.lora_B.bias", value
    out = b.shape[0]
    if value.numel() != out or (role == "dora_scale" and value.shape[0] != out):
        raise CheckpointError(
            f"{path}: the magnitudes of {name} are {list(value.shape)}, one for each input. lora_fx has "
            f"DoRA's, one for each of the {out} outputs. {CONVERTER}"
        )
    shape = (1, out, *(1,) * (dims - 2)) if dims > 2 else (out,)
    return f"{name}.lora_magnitude_vector", value.reshape(shape)


def _config_in(path: Path, metadata: Mapping[str, str], part: str) -> LoraConfig | None:
    """Return the configuration in the metadata of a diffusers file, or None if there is none."""
    text = metadata.get(DIFFUSERS_METADATA)
    if text is None:
        return None
    try:
        written: dict[str, Any] = json.loads(text)
        values = {
            key.removeprefix(f"{part}."): value
            for key, value in written.items()
            if not part or key.startswith(f"{part}.")
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata {DIFFUSERS_METADATA} are damaged") from error
    return LoraConfig.from_dict(values) if values else None
