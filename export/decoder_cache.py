"""The key-value cache of transformers as plain tensors, and the metadata of a file for generation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError

__all__ = [
    "ENCODER_KEY",
    "GENERATION_KEY",
    "TASK_KEY",
    "CacheLayout",
    "Past",
    "cache_argument",
    "cache_of",
    "filled_cache",
    "generation_metadata",
    "position_limit",
    "read_cache",
]


# Conversion of the key-value cache of transformers to plain tensors, and back.
#
# A cache in a file is one key and one value for each attention layer, of shape
# ``[batch, heads, length, width]``. Layers with a sliding window keep all positions, too. The mask excludes
# positions beyond the window, and all layers have the same length.

Past: TypeAlias = Mapping[int, Mapping[str, Tensor]]
"""Cache as tensors: for each layer index a mapping with the tensors "key" and "value"."""

_NAMES = ("cache", "past_key_values")  # the name since transformers 5.24, and the name before


@dataclass(frozen=True)
class CacheLayout:
    """Layout of the cache of a model, without its values.

    Attributes:
        layers: Heads and width of "key" and "value", by number of each layer that has a cache.
        dtype: The dtype of all tensors.
        device: The device of all tensors.
    """

    layers: Mapping[int, Mapping[str, tuple[int, int]]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, past: Past) -> CacheLayout:
        """Return the layout of a cache."""
        first = next(iter(past.values()))["key"]
        layers = {
            index: {kind: (tensor.shape[1], tensor.shape[3]) for kind, tensor in layer.items()}
            for index, layer in past.items()
        }
        return cls(layers, first.dtype, first.device)

    def zeros(self, batch: int, length: int) -> dict[int, dict[str, Tensor]]:
        """Return a cache of zeros for ``length`` positions."""
        options: Any = {"dtype": self.dtype, "device": self.device}
        return {
            index: {
                kind: torch.zeros(batch, heads, length, width, **options)
                for kind, (heads, width) in layer.items()
            }
            for index, layer in self.layers.items()
        }

    def cast(self, past: Past) -> dict[int, dict[str, Tensor]]:
        """Cast ``past`` to the dtype of the file's inputs."""
        return {
            index: {kind: tensor.to(self.dtype) for kind, tensor in layer.items()}
            for index, layer in past.items()
        }


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the model's argument for the cache; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in parameters), None)


def cache_of(outputs: Any) -> Any:
    """Return the cache among the outputs of a model, or None."""
    return next((outputs[name] for name in _NAMES if name in outputs), None)


def filled_cache(past: Past) -> Any:
    """Return a cache of transformers whose layers have ``past`` and keep every position."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for index in range(max(past) + 1):
        layer = DynamicLayer()
        if index in past:
            key, value = past[index]["key"], past[index]["value"]
            layer.lazy_initialization(key, value)
            # update() would concatenate an empty tensor with one axis, which ONNX does not allow.
            layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def read_cache(cache: Any, owner: str) -> dict[int, dict[str, Tensor]]:
    """Return the tensors of a cache of transformers.

    Args:
        cache: The cache that the model returned.
        owner: Class of the model, for the message.

    Raises:
        ExportError: A layer of the cache has no keys and values, as in state-space models.
    """
    past: dict[int, dict[str, Tensor]] = {}
    for index, layer in enumerate(getattr(cache, "layers", ())):
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if getattr(layer, "is_linear", False) or not hasattr(layer, "keys"):
            raise ExportError(
                f"layer {index} of {owner} keeps a {type(layer).__name__}, no keys and values: only "
                f"caches of attention can be inputs of a file. Export it without task="
            )
        if key is None or value is None:
            continue  # a layer that reads the keys and values of another layer
        if key.ndim != 4 or value.ndim != 4:
            raise ExportError(
                f"layer {index} of {owner} caches keys of shape {list(key.shape)}: expected "
                f"[batch, heads, length, width]"
            )
        past[index] = {"key": key, "value": value}
    if not past:
        raise ExportError(f"{owner} gave no key-value cache back: it is no decoder that keeps one")
    return past


TASK_KEY = "lora_fx.task"
GENERATION_KEY = "lora_fx.generation"
ENCODER_KEY = "lora_fx.encoder"

# Names of the largest number of positions in configurations of decoders.
_LIMITS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")

_DROPS_CACHE = ("phi3", "phimoe", "phi4_multimodal")


def generation_metadata(model: nn.Module, task: str) -> dict[str, str]:
    """Return the metadata of the file of a decoder.

    ``lora_fx.generation`` is JSON. ``defaults`` has the fields that are set in the model's
    ``generation_config``. ``limit`` is the largest length of a text, prompt included, or null.
    ``prepends_start`` is true if each prompt has to begin with the decoder's start token.
    ``reads_anew_after`` is the length beyond which a cache cannot be used any more, or null.
    """
    config: Any = model.config
    takes_any_prompt = config.model_type == "whisper" or "donut" in type(model).__name__.lower()
    remembered = {
        "defaults": _defaults(model),
        "limit": position_limit(model),
        "prepends_start": not takes_any_prompt,
        "reads_anew_after": _cache_limit(model),
    }
    return {TASK_KEY: task, GENERATION_KEY: json.dumps(remembered, sort_keys=True)}


def position_limit(model: nn.Module) -> int | None:
    """Return the number of positions of a decoder; None if there is no limit."""
    config: Any = model.config
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        return None  # T5's distances are unlimited; its n_positions is the length of its training texts
    decoder = config.get_text_config(decoder=True)
    for name in _LIMITS:
        value = getattr(decoder, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _cache_limit(model: nn.Module) -> int | None:
    """Return the length at which transformers drops a cache, or None.

    Models with LongRoPE (arXiv 2402.13753) use other rotary frequencies beyond this length, which do not
    match the cached keys. Only the Phi family drops the cache. Others keep it, in transformers and in the
    file.
    """
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    rope = getattr(decoder, "rope_parameters", None) or {}
    if config.model_type not in _DROPS_CACHE or rope.get("rope_type") != "longrope":
        return None
    length: int = decoder.original_max_position_embeddings
    return length


def _defaults(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return {}
    fields: Mapping[str, Any] = config.to_dict()
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not name.startswith("_") and _is_json(value)
    }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
