"""What a file says of where it comes from: the base model and the adapters in it."""

from __future__ import annotations

import json
from pathlib import PurePosixPath, PureWindowsPath

from torch import nn

from lora_fx.config.lora_config import LoraConfig
from lora_fx.ir.record import record_of
from lora_fx.passes.graph.region import original_class

__all__ = ["base_name", "origin_of"]

_NAME = "base_model_name_or_path"


def origin_of(model: nn.Module, adapters: str = "merged") -> dict[str, str]:
    """Metadata entries about a model: nothing of the machine that it is on.

    Args:
        model: A rewritten model, or any other.
        adapters: Where the active adapters are: "merged" into weights, or "inline" beside operations.

    Returns:
        ``lora_fx.base``: its class, and the name of its configuration if it has one, as JSON.
        ``lora_fx.merged`` or ``lora_fx.inline``, for a rewritten model: name to configuration of the
        adapters that are active, as JSON, without the fields that have their default value.
    """
    kind = original_class(model)
    base = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if name := _loaded_from(model):
        base["name"] = name
    entries = {"lora_fx.base": json.dumps(base)}
    record = record_of(model)
    if record is not None:
        active = {name: _changed(record.adapters[name].config) for name in record.active}
        entries[f"lora_fx.{adapters}"] = json.dumps(active)
    return entries


def base_name(model: nn.Module) -> str:
    """The same in short, for people: ``LlamaForCausalLM (meta-llama/Llama-3.2-1B)``."""
    kind, name = original_class(model).__name__, _loaded_from(model)
    return f"{kind} ({name})" if name else kind


def _loaded_from(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    name = (
        getattr(config, "name_or_path", None)
        or getattr(config, "_name_or_path", None)
        or vars(model).get("name_or_path")
    )
    return _public(name) if isinstance(name, str) and name else ""


def _changed(config: LoraConfig) -> dict[str, object]:
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    kept = {key: value for key, value in values.items() if key in always or value != defaults[key]}
    if isinstance(name := kept.get(_NAME), str):
        kept[_NAME] = _public(name)
    return kept


def _public(name: str) -> str:
    """The name of a model as it is; of a folder, no more than its own name."""
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return path.name if path.is_absolute() or name[0] in ".~" else name
