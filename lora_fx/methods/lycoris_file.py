"""Files of LyCORIS, kohya's scripts and ComfyUI with layers of any method.

A layer has the tensors of a method, and perhaps ``alpha``, a difference of its bias, and ``dora_scale``. The
last is a magnitude for each output (DoRA) or, in LyCORIS with ``wd_on_output=False``, for each input.

LyCORIS's own ``merge_to`` applies alpha / r twice for LoHa and LoKr. Its forward, which trains, applies it
once.

Sources: LyCORIS's ``lycoris/modules``, kohya's ``networks/oft.py``, ComfyUI's ``comfy/weight_adapter``.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from lora_fx.adapter_files import read_file
from lora_fx.errors import CheckpointError, some
from lora_fx.ir import join
from lora_fx.methods.base import CONVERTER, ForeignAdapter, Layer, Method, ParameterChange
from lora_fx.methods.layer_names import PlacedLayers, check_part, lora_role, place_layers
from lora_fx.methods.locon import MID, LoCon
from lora_fx.passes.parameters import base_modules

__all__ = ["check_is_lora", "read_lycoris_file"]

_log = logging.getLogger("lora_fx")

_Tensors = dict[str, tuple[str, Tensor]]
# Roles of tensors that belong to a layer of any method.
_COMMON: Final = ("alpha", "dora_scale", "magnitude")
_UNREADABLE: Final[Mapping[str, str]] = {
    r"\.reshape_weight$": "weights of another shape than the model's",
    r"\.oft_diag$": "an early form of OFT",
    r"\.scaled_lora|\.lora_ga_": "another method than LoRA",
    r"\.lambda_layer$": "T-LoRA, whose rank depends on the step of the sampler",
    r"\.bias_(?:indices|values|size)$": "sparse biases of early LyCORIS",
}


def check_is_lora(path: Path, tensors: Mapping[str, Tensor], methods: Sequence[Method]) -> None:
    """Raise if a file has layers of another method than LoRA and DoRA.

    Args:
        path: The file.
        tensors: Its tensors, by key.
        methods: The methods of files.

    Raises:
        CheckpointError: If there is such a layer. The message names the tensor, its method, and the
            converter.
    """
    layers, _ = _group(path, tensors, methods)
    for key, method in _beyond_lora(layers.values(), methods):
        raise CheckpointError(
            f"{path}: {key} belongs to {method.name}: {method.does}. load_adapter reads LoRA and DoRA. "
            f"{CONVERTER}"
        )


def _beyond_lora(
    layers: Iterable[_Tensors], methods: Sequence[Method]
) -> Iterator[tuple[str, Method]]:
    """Yield the keys of tensors that are not of LoRA or DoRA, and their methods."""
    for roles in layers:
        for method in _methods_of(roles, methods):
            own = (MID,) if isinstance(method, LoCon) else method.roles
            yield from ((roles[role][0], method) for role in own if role in roles)


def read_lycoris_file(
    path: Path, model: nn.Module, component: str | None, methods: Sequence[Method]
) -> ForeignAdapter:
    """Read an adapter in a file of LyCORIS, kohya or ComfyUI.

    Args:
        path: The file.
        model: The base model. Only its names, classes and shapes are used.
        component: The part of the pipeline that the model is, if several parts of the file could fit.
        methods: The methods of files.

    Raises:
        CheckpointError: If the file is damaged, belongs to another method or model, or could be meant for
            several parts.
        ConfigError: If the component does not exist.
    """
    if component is not None:
        check_part(component)
    tensors, metadata = read_file(path)
    by_name, unknown = _group(path, tensors, methods)
    if unknown:
        raise CheckpointError(
            f"{path}: these tensors are of no method that lora_fx knows: {some(unknown)}"
        )
    if not by_name:
        raise CheckpointError(f"{path} holds no tensor")
    modules = dict(base_modules(model, every_name=True))
    placed = place_layers(path, by_name, modules, component)
    changes: list[ParameterChange] = []
    whole: dict[str, Tensor] = {}
    names = []
    for name, roles in placed.layers.items():
        layer = Layer(
            path,
            name,
            placed.names[name],
            modules[name],
            {role: value for role, (_, value) in roles.items()},
            {role: key for role, (key, _) in roles.items()},
        )
        of_layer = _methods_of(roles, methods)
        if any(isinstance(method, LoCon) for method in of_layer):
            _check_alpha(layer, metadata)
        names += [method.name for method in of_layer]
        changes += _changes(layer, of_layer)
        for method in of_layer:
            whole |= method.whole(layer)
    _warn_of_parts(path, by_name, placed)
    _warn_of_plain_lora(path, placed.layers.values(), methods)
    _warn_of_scales(path, placed.layers.values(), methods)
    return ForeignAdapter(" and ".join(dict.fromkeys(names)), tuple(changes), whole, {})


def _warn_of_parts(
    path: Path, by_name: Mapping[str, _Tensors], placed: PlacedLayers[_Tensors]
) -> None:
    """Log a warning if a file has layers of other parts of a pipeline."""
    own = {id(roles) for roles in placed.layers.values()}
    left_out = [name for name, roles in by_name.items() if id(roles) not in own]
    if left_out:
        _log.warning(
            "%s: %d layer(s) are left out, because they are not of the part %r, which this model was taken "
            "for: %s. Convert them with the model of their part",
            path,
            len(left_out),
            placed.part,
            some(left_out),
        )


def _warn_of_plain_lora(path: Path, layers: Iterable[_Tensors], methods: Sequence[Method]) -> None:
    """Log a warning if a file is plain LoRA or DoRA, which ``load_adapter`` reads without a conversion."""
    layers = list(layers)
    scales = [roles["dora_scale"][1] for roles in layers if "dora_scale" in roles]
    per_input = any(scale.shape[:1] == (1,) for scale in scales)
    if not per_input and not any(_beyond_lora(layers, methods)):
        _log.warning(
            "%s is plain LoRA or DoRA: lora_fx.load_adapter(model, path) reads it as it is, and a conversion "
            "may lose some of it",
            path,
        )


def _warn_of_scales(path: Path, layers: Iterable[_Tensors], methods: Sequence[Method]) -> None:
    """Log a warning if no layer of a file has an ``alpha``. The scale alpha / r is then taken to be 1."""
    scaled = [
        roles for roles in layers if any(method.scaled for method in _methods_of(roles, methods))
    ]
    if scaled and not any("alpha" in roles for roles in scaled):
        _log.warning(
            "%s says nothing of alpha: each is taken for the rank, so that products are added as they are",
            path,
        )


def _check_alpha(layer: Layer, metadata: Mapping[str, str]) -> None:
    if "alpha" not in layer.tensors and "lora_adapter_metadata" in metadata:
        raise layer.error(
            "the file has no alpha for it, and metadata of diffusers, which this reader does not use: save "
            "the adapter with an alpha for each layer"
        )


def _group(
    path: Path, tensors: Mapping[str, Tensor], methods: Sequence[Method]
) -> tuple[dict[str, _Tensors], list[str]]:
    """Return the tensors by role for each layer in a file, and the tensors that no method knows."""
    ends = sorted({role for method in methods for role in method.roles}, key=len, reverse=True)
    layers: dict[str, _Tensors] = defaultdict(dict)
    unknown = []
    for key, value in tensors.items():
        for end, kind in _UNREADABLE.items():
            if re.search(end, key):
                raise CheckpointError(
                    f"{path}: {key} belongs to {kind}, which lora_fx cannot read. Merge it with the library "
                    "that made it; then lora_fx.extract_adapter(base, merged, rank=...) makes LoRA of the "
                    "difference"
                )
        named = lora_role(key)
        if named is None:
            end = next((end for end in ends if key.endswith(f".{end}")), "")
            named = (key.removesuffix(f".{end}"), end) if end else None
        if named is None:
            unknown.append(f"{key} {list(value.shape)}")
            continue
        name, role = named
        if role in layers[name]:
            raise CheckpointError(
                f"{path}: {name.removesuffix('|old')} has several tensors for its {role}"
            )
        layers[name][role] = (key, value)
    for name, roles in list(layers.items()):
        if not _methods_of(roles, methods):
            unknown += [f"{key} {list(value.shape)}" for key, value in roles.values()]
            del layers[name]
    return layers, unknown


def _methods_of(roles: _Tensors, methods: Sequence[Method]) -> list[Method]:
    values = {role: value for role, (_, value) in roles.items()}
    return [method for method in methods if method.is_file_layer(values)]


def _changes(layer: Layer, methods: Sequence[Method]) -> Iterator[ParameterChange]:
    """Yield the changes of a layer, one for each of its parameters.

    Raises:
        CheckpointError: If tensors belong to no method of the layer, or several methods change its weight.
    """
    known = {*_COMMON, *(role for method in methods for role in method.roles)}
    strays = [layer.keys[role] for role in layer.tensors if role not in known]
    if strays:
        raise layer.error(
            f"{some(strays)} do not belong to {' and '.join(method.name for method in methods)}: the file is "
            "damaged"
        )
    weight = join(layer.name, "weight")
    by_parameter: dict[str, ParameterChange] = {}
    for method in methods:
        for change in method.changes(layer):
            if change.parameter in by_parameter:
                raise layer.error(
                    f"several methods change {change.parameter}: "
                    f"{' and '.join(method.name for method in methods)}. lora_fx does not know their order"
                )
            by_parameter[change.parameter] = change
    if {"dora_scale", "magnitude"} & layer.tensors.keys():
        if weight not in by_parameter:
            raise layer.error("it has magnitudes and nothing else: the file is damaged")
        by_parameter[weight] = _with_magnitudes(layer, by_parameter[weight])
    yield from by_parameter.values()


def _with_magnitudes(layer: Layer, change: ParameterChange) -> ParameterChange:
    """Return a change that also rescales its result to the magnitudes of DoRA, per output or per input."""
    role = "dora_scale" if "dora_scale" in layer.tensors else "magnitude"
    magnitudes = layer.take(role)
    out, inputs, *kernel = layer.shape
    ones = [1] * len(kernel)
    if role == "magnitude" or tuple(magnitudes.shape) == (out, 1, *ones):
        kept, count = 0, out
    elif tuple(magnitudes.shape) == (1, inputs, *ones):
        kept, count = 1, inputs
    else:
        raise layer.misfit(
            f"{layer.keys[role]} is {list(magnitudes.shape)}, and there is a number for each of {out} "
            f"outputs or {inputs} inputs"
        )
    if magnitudes.numel() != count:
        raise layer.misfit(
            f"{layer.keys[role]} is {list(magnitudes.shape)}, and there are {count} outputs"
        )

    def adapted(weight: Tensor) -> Tensor:
        value = change.adapted(weight)
        reduced = [dim for dim in range(value.dim()) if dim != kept]
        norms = torch.linalg.vector_norm(value, dim=reduced, keepdim=True)
        # LyCORIS adds the smallest step of fp32.
        norms = norms + torch.finfo(torch.float32).eps
        factors: Tensor = magnitudes.to(value).reshape(norms.shape) / norms
        return value * factors

    return layer.change(adapted)
