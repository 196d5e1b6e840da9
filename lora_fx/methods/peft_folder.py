"""PEFT's folders of other methods than LoRA.

The keys are those of LoRA's folders: ``base_model.model.<layer>.<role>``. Tensors of all layers together have
the prefix ``base_model.`` alone.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_fx.adapter_files import read_tensors
from lora_fx.errors import CheckpointError, some
from lora_fx.ir import join
from lora_fx.methods.base import ForeignAdapter, Layer, Method, ParameterChange
from lora_fx.passes.parameters import base_modules
from lora_fx.passes.plan import tied_embedding

__all__ = ["read_peft_folder"]

_PREFIXES: Final = ("base_model.model.", "base_model.")
# Modules that PEFT puts around those of the model.
_ORIGINAL: Final = "original_module"
_WRAPPERS: Final = frozenset({"base_layer", "modules_to_save", _ORIGINAL})
_KEPT: Final = ("task_type", "base_model_name_or_path", "modules_to_save")


def read_peft_folder(
    folder: Path, model: nn.Module, method: Method, config: Mapping[str, Any]
) -> ForeignAdapter:
    """Read a folder of PEFT that has an adapter of another method than LoRA.

    Args:
        folder: The folder.
        model: The base model. Only its names, classes and shapes are used.
        method: The method of the folder.
        config: Values of ``adapter_config.json``.

    Raises:
        CheckpointError: If the files are damaged, or for another model. The message names all tensors that
            fit no layer of the model.
    """
    modules = dict(base_modules(model, every_name=True))
    tensors = _sort_tensors(folder, model, method, modules)
    layers = _layers(folder, tensors, modules, config)
    shared = dict(method.derive_shared(layers, tensors.shared))
    whole = dict(tensors.whole)
    changes: list[ParameterChange] = []
    source = tied_embedding(model) if method.ties else None
    leader = next((layer for layer in layers if layer.module is source), None)
    for layer in layers:
        layer = dataclasses.replace(layer, shared=shared)
        tied = leader is not None and layer.module.weight is leader.module.weight
        if leader is not None and tied and layer.module is not source:
            # PEFT stores the tensors of the embedding again.
            for role, value in layer.tensors.items():
                _check_shared(folder, layer.keys[role], value, leader.tensors[role])
            continue
        changes += (dataclasses.replace(c, tied=tied) for c in method.changes(layer))
        whole |= method.whole(layer)
    return ForeignAdapter(
        method.name,
        tuple(changes),
        whole,
        {name: config[name] for name in _KEPT if name in config},
    )


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of a folder, by their purpose.

    Attributes:
        by_layer: The tensors of each layer: their keys in the folder and values, by role.
        shared: The tensors that all layers share, by role.
        whole: Parameters that are stored in full, by FQN.
    """

    by_layer: Mapping[str, Mapping[str, tuple[str, Tensor]]]
    shared: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]


def _sort_tensors(
    folder: Path, model: nn.Module, method: Method, modules: Mapping[str, nn.Module]
) -> _Tensors:
    """Read the tensors of a folder, and find the layer and the role of each.

    Raises:
        CheckpointError: As :func:`read_peft_folder`.
    """
    by_layer: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    unknown = []
    for key, value in read_tensors(folder)[0].items():
        bare = _bare(key)
        layer_of, role = _split(bare, method.roles)
        _, shared_role = _split(bare, method.shared)
        if shared_role:
            _check_shared(folder, key, value, shared.setdefault(shared_role, value))
        elif role:
            by_layer[layer_of][role] = (key, value)
        elif (stored := _stored_whole(bare, value, modules)) is not None:
            # bias="all" also saves the unused original of a module that is trained in full.
            if _ORIGINAL not in bare.split("."):
                whole[stored] = value
            else:
                whole.setdefault(stored, value)
        else:
            unknown.append(f"{key} {list(value.shape)}")
    unknown += [
        f"{key} {list(value.shape)}"
        for name, roles in by_layer.items()
        if name not in modules
        for key, value in roles.values()
    ]
    if unknown:
        raise CheckpointError(
            f"{folder}: this {type(model).__name__} has no place for these tensors of {method.name}; give "
            f"the model that the adapter was trained on: {some(unknown)}"
        )
    if not by_layer:
        raise CheckpointError(f"{folder} holds no tensor of {method.name}; save the adapter again")
    return _Tensors(by_layer, shared, whole)


def _layers(
    folder: Path,
    tensors: _Tensors,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
) -> list[Layer]:
    """Return the layers of an adapter in the order of the model's modules, as PEFT goes through them."""
    first_names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first_names.setdefault(module, name)
    by_layer = tensors.by_layer
    return [
        Layer(
            folder,
            first_names[module],
            name,
            module,
            {role: value for role, (_, value) in by_layer[name].items()},
            {role: key for role, (key, _) in by_layer[name].items()},
            config,
        )
        for name, module in modules.items()
        if name in by_layer
    ]


def _bare(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _split(key: str, roles: tuple[str, ...]) -> tuple[str, str]:
    """Split the key of a tensor into layer and role; return two empty strings for a key without a role.

    Rotations of OFT end in ``.weight``.
    """
    for role in roles:
        for end in (f".{role}", f".{role}.weight"):
            if f".{key}".endswith(end):
                return f".{key}".removesuffix(end).removeprefix("."), role
    return "", ""


def _check_shared(folder: Path, key: str, value: Tensor, first: Tensor) -> None:
    """Raise if two copies of a shared tensor differ. PEFT may save a copy for each layer."""
    if not torch.equal(value, first):
        raise CheckpointError(
            f"{folder}: {key} differs from the same tensor of another layer, which all layers share: the "
            "file is damaged"
        )


def _stored_whole(key: str, value: Tensor, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the FQN of the parameter or buffer that a key of a folder stores in full.

    None if the model has no such tensor of this shape.
    """
    bare = join(*(atom for atom in key.split(".") if atom not in _WRAPPERS))
    for name in (key, bare):
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if module is not None:
            tensor = module._parameters.get(leaf, module._buffers.get(leaf))
            if tensor is not None and tensor.shape == value.shape:
                return name
    return None
