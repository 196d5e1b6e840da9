"""Names of layers and tensors in files of diffusers, kohya, LyCORIS and ComfyUI.

A name may begin with the part of a pipeline that the layer belongs to (``unet.``, ``lora_te1_``). In
flattened names, ``_`` stands for ``.``. Several layers of a model may share a flattened name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

from torch import nn

from lora_fx.errors import CheckpointError, ConfigError, some

__all__ = ["PARTS", "PlacedLayers", "check_part", "lora_role", "place_layers"]

_T = TypeVar("_T")

PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "unet": ("unet.", "lora_unet_", "oft_unet_", "lycoris_"),
    "transformer": (
        *("transformer.", "lora_transformer_", "lora_unet_", "lycoris_"),
        "diffusion_model.",
    ),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_"),
}
"""Prefixes of the keys of each part of a pipeline."""

_FLATTENED: Final = tuple(
    start for begins in PARTS.values() for start in begins if start.endswith("_")
)
# The outermost module of a text encoder, which transformers had until version 5.
_AROUND = ("text_model.", "text_model_")

_ROLES: Final = tuple(
    (re.compile(rf"(?P<name>.+?){end}"), role)
    for end, role in (
        (r"\.lora_A(?:\.default)?\.weight", "A"),
        (r"\.lora_B(?:\.default)?\.weight", "B"),
        (r"\.lora_B(?:\.default)?\.bias", "bias"),
        (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", "magnitude"),
        (r"\.lora_down\.weight", "A"),
        (r"\.lora_up\.weight", "B"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.lora(?:_linear_layer)?\.down\.weight", "A"),
        (r"\.lora(?:_linear_layer)?\.up\.weight", "B"),
        (r"_lora\.down\.weight", "old A"),
        (r"_lora\.up\.weight", "old B"),
    )
)

_OLD = {
    "to_out": ("to_out.0", "out_proj"),
    "to_q": ("q_proj",),
    "to_k": ("k_proj",),
    "to_v": ("v_proj",),
}


def check_part(component: str) -> None:
    """Raise if ``component=`` is not the name of a part of a pipeline.

    Raises:
        ConfigError: If the name is unknown. The message lists the parts.
    """
    if component not in tuple(PARTS):
        raise ConfigError(f"component={component!r}: it is one of {', '.join(map(repr, PARTS))}")


def lora_role(key: str) -> tuple[str, str] | None:
    """Return the layer and the role of a tensor of LoRA or DoRA, or None for a tensor of another method.

    Args:
        key: The key of the tensor in the file. The name of the layer ends in ``|old`` if the key has the form
            of the oldest releases of diffusers.

    Returns:
        The role is "A", "B", "alpha", "bias" (of B), "magnitude" (of DoRA, in PEFT's shape) or "dora_scale"
        (the same in kohya's shape).
    """
    for end, role in _ROLES:
        match = end.fullmatch(key)
        if match is not None:
            old = "|old" if role.startswith("old ") else ""
            return match["name"] + old, role.removeprefix("old ")
    return None


class PlacedLayers(NamedTuple, Generic[_T]):
    """Layers of a file that belong to a model.

    Attributes:
        part: The part of the pipeline; "" if the file has no parts.
        names: Names in the file without the prefix of the part, by names in the model.
        layers: Contents of the layers, by names in the model.
    """

    part: str
    names: dict[str, str]
    layers: dict[str, _T]


def place_layers(
    path: Path, layers: Mapping[str, _T], modules: Mapping[str, nn.Module], component: str | None
) -> PlacedLayers[_T]:
    """Return the layers of a file that belong to a model.

    Args:
        path: The file, for errors.
        layers: Contents of each layer, by its name in the file.
        modules: The modules of the model by each of their names.
        component: The part of the pipeline that the model is, if it is known.

    Raises:
        CheckpointError: If the file is for another model, or could be meant for several parts.
    """
    flat, parts = _flattened_names(modules), _by_part(layers, component)
    flattened = {name for name in layers if name.startswith(_FLATTENED)}
    fits: dict[str, PlacedLayers[_T]] = {}
    missing: dict[str, list[str]] = {}
    for part, named in parts.items():
        targets = {
            name: _place(path, bare, modules, flat, exact=name not in flattened or bare == name)
            for name, bare in named.items()
        }
        lost = [name for name, target in targets.items() if target is None]
        if lost:
            missing[part] = lost
        else:
            _check_once(path, targets)
            fits[part] = PlacedLayers(
                part,
                {str(target): named[name] for name, target in targets.items()},
                {str(target): layers[name] for name, target in targets.items()},
            )
    # A file for a single model has no parts.
    if "" in fits and component is None:
        return fits[""]
    # Kohya calls every image model unet.
    if fits and len({frozenset(parts[part]) for part in fits}) == 1:
        return next(iter(fits.values()))
    if fits:
        raise CheckpointError(
            f"{path} has adapters that fit this model under {' and '.join(fits)}: give component= one of "
            "them"
        )
    names = sorted(set(parts) - {""}) or ["no part of a pipeline that lora_fx knows"]
    lost = min(missing.values(), key=len) if missing else list(layers)
    raise CheckpointError(
        f"{path} is for another model: it has adapters for {', '.join(names)}, and of its layers this model "
        f"has no {some([name.removesuffix('|old') for name in lost])}"
    )


def _flattened_names(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the modules' names by their flattened names, with ``_`` for ``.``. Several can share one."""
    names: dict[str, list[str]] = defaultdict(list)
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
        # A module with several names is one layer, known by its first name.
        if first[module] not in names[name.replace(".", "_")]:
            names[name.replace(".", "_")].append(first[module])
    return names


def _by_part(layers: Iterable[str], component: str | None) -> dict[str, dict[str, str]]:
    """Return the names of layers by the part of the pipeline that they may belong to.

    The values are the names without the part's prefix.
    """
    parts: dict[str, dict[str, str]] = {}
    for part, begins in {"": ("", "base_model.model."), **PARTS}.items():
        for start in begins:
            named = {name: name.removeprefix(start) for name in layers if name.startswith(start)}
            if named and (component is None or component == part):
                parts.setdefault(part, {}).update(named)
    return parts


def _check_once(path: Path, targets: Mapping[str, str | None]) -> None:
    """Raise if two adapters belong to the same layer, because only one of them would be loaded."""
    first: dict[str, str] = {}
    for layer, target in targets.items():
        other = first.setdefault(str(target), layer)
        if other != layer:
            names = " and ".join(name.removesuffix("|old") for name in (other, layer))
            raise CheckpointError(f"{path} has two adapters for {target} of this model: {names}")


def _place(
    path: Path,
    name: str,
    modules: Mapping[str, nn.Module],
    flat: Mapping[str, list[str]],
    *,
    exact: bool,
) -> str | None:
    """Return the name of the module that a layer of the file adapts, or None if the model has no such module.

    Args:
        path: The file.
        name: The name in the file, without the prefix of the part.
        modules: The modules of the model.
        flat: The modules' names, by the same names with ``_`` for ``.``.
        exact: True to prefer a module of exactly this name. In a flattened name each ``_`` may be a dot.
    """
    name, _, old = name.partition("|")
    candidates = [name]
    if old:
        owner, _, leaf = name.replace(".processor.", ".").rpartition(".")
        candidates = [f"{owner}.{leaf}", *(f"{owner}.{new}" for new in _OLD.get(leaf, ()))]
    candidates += [alias.removeprefix(start) for alias in candidates for start in _AROUND]
    for candidate in candidates if exact else ():
        if candidate in modules and _has_weight(modules[candidate]):
            return next(
                known
                for known in flat[candidate.replace(".", "_")]
                if modules[known] is modules[candidate]
            )
    several = [
        known
        for alias in candidates
        for known in flat.get(alias, ())
        if _has_weight(modules[known])
    ]
    several = list(dict.fromkeys(several))
    if len(several) > 1:
        raise CheckpointError(f"{path}: {name} may be {' or '.join(several)} of this model")
    return several[0] if several else None


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None
