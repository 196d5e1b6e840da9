"""The key-value cache of transformers as plain tensors, and what a file remembers for generation."""

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


# The key-value cache of transformers as plain tensors, and back.
#
# A cache in a file is one key and one value for each attention layer, of shape
# ``[batch, heads, length, width]``. Every layer keeps all positions, those with a sliding window, too:
# the mask leaves out what is beyond the window, and all layers have one length.

Past: TypeAlias = Mapping[int, Mapping[str, Tensor]]
"""Number of a layer to its "key" and its "value"."""

_NAMES = ("cache", "past_key_values")  # of transformers since and before 5.24


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a model, without its values.

    Attributes:
        layers: Number of each layer that has a cache to heads and width of its "key" and its "value".
        dtype: Of both.
        device: Of both.
    """

    layers: Mapping[int, Mapping[str, tuple[int, int]]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, past: Past) -> CacheLayout:
        """The layout of a cache."""
        first = next(iter(past.values()))["key"]
        layers = {
            index: {kind: (tensor.shape[1], tensor.shape[3]) for kind, tensor in layer.items()}
            for index, layer in past.items()
        }
        return cls(layers, first.dtype, first.device)

    def zeros(self, batch: int, length: int) -> dict[int, dict[str, Tensor]]:
        """A cache of zeros for ``length`` positions."""
        options: Any = {"dtype": self.dtype, "device": self.device}
        return {
            index: {
                kind: torch.zeros(batch, heads, length, width, **options)
                for kind, (heads, width) in layer.items()
            }
            for index, layer in self.layers.items()
        }

    def taken(self, past: Past) -> dict[int, dict[str, Tensor]]:
        """``past`` as an input of the file: what was computed with more digits is rounded."""
        return {
            index: {kind: tensor.to(self.dtype) for kind, tensor in layer.items()}
            for index, layer in past.items()
        }


def cache_argument(model: nn.Module) -> str | None:
    """What the model calls the argument for its cache; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in parameters), None)


def cache_of(outputs: Any) -> Any:
    """The cache among the outputs of a model, or None."""
    return next((outputs[name] for name in _NAMES if name in outputs), None)


def filled_cache(past: Past) -> Any:
    """A cache of transformers whose layers hold ``past`` and keep every position."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for index in range(max(past) + 1):
        layer = DynamicLayer()
        if index in past:
            key, value = past[index]["key"], past[index]["value"]
            layer.lazy_initialization(key, value)
            # Not by update(): its concatenation with an empty tensor of one axis is no ONNX.
            layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def read_cache(cache: Any, owner: str) -> dict[int, dict[str, Tensor]]:
    """The tensors of a cache of transformers.

    Args:
        cache: What the model returned.
        owner: Class of the model, for the message.

    Raises:
        ExportError: It has layers that are no keys and values, as those of state-space models.
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
            continue  # a layer that reads the keys and values of another one
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

# Largest number of positions, by the names that configurations of decoders have for it.
_LIMITS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")

_READING_ANEW = ("phi3", "phimoe", "phi4_multimodal")


def generation_metadata(model: nn.Module, task: str) -> dict[str, str]:
    """The metadata of the file of a decoder.

    ``lora_fx.generation`` is JSON: ``defaults`` has the fields of the model's ``generation_config``
    that are set, ``limit`` the number of positions that it has, prompt included, or null, and
    ``prepends_start`` says whether a decoder's prompt has to begin with its first token, and
    ``reads_anew_after`` is the length beyond which a cache is of no use any more, or null.
    """
    config: Any = model.config
    freely = config.model_type == "whisper" or "donut" in type(model).__name__.lower()
    remembered = {
        "defaults": _defaults(model),
        "limit": position_limit(model),
        "prepends_start": not freely,
        "reads_anew_after": _reads_anew_after(model),
    }
    return {TASK_KEY: task, GENERATION_KEY: json.dumps(remembered, sort_keys=True)}


def position_limit(model: nn.Module) -> int | None:
    """How many tokens a decoder has positions for; None where there is no limit."""
    config: Any = model.config
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        return None  # T5's distances have no end; its n_positions says what it was trained on
    decoder = config.get_text_config(decoder=True)
    for name in _LIMITS:
        value = getattr(decoder, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _reads_anew_after(model: nn.Module) -> int | None:
    """Where transformers gives the cache up: its keys were turned by the frequencies of short texts.

    Others than the Phi family go on with such keys under LongRoPE (2402.13753), in transformers and in
    the file alike.
    """
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    rope = getattr(decoder, "rope_parameters", None) or {}
    if config.model_type not in _READING_ANEW or rope.get("rope_type") != "longrope":
        return None
    length: int = decoder.original_max_position_embeddings
    return length


def _defaults(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return {}
    found: Mapping[str, Any] = config.to_dict()
    return {
        name: value
        for name, value in found.items()
        if value is not None and not name.startswith("_") and _is_json(value)
    }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
