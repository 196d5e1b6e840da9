"""The key-value cache of transformers as plain tensors, and back.

A cache in a file is one key and one value for each attention layer, of shape
``[batch, heads, length, width]``. Every layer keeps all positions, those with a sliding window, too:
the mask leaves out what is beyond the window, and all layers have one length.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError

__all__ = ["CacheLayout", "Past", "cache_argument", "cache_of", "filled_cache", "read_cache"]

Past: TypeAlias = Mapping[int, Mapping[str, Tensor]]
"""Number of a layer to its "key" and its "value"."""

_NAMES = ("cache", "past_key_values")  # of transformers since and before 5.24


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a model, without its values.

    Attributes:
        keys: Number of each layer that has a cache to heads and width of its keys.
        values: The same for its values.
        dtype: Of both.
        device: Of both.
    """

    keys: Mapping[int, tuple[int, int]]
    values: Mapping[int, tuple[int, int]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, past: Past) -> CacheLayout:
        """The layout of a cache."""
        first = next(iter(past.values()))["key"]
        keys = {index: _sizes(layer["key"]) for index, layer in past.items()}
        values = {index: _sizes(layer["value"]) for index, layer in past.items()}
        return cls(keys, values, first.dtype, first.device)

    def zeros(self, batch: int, length: int) -> dict[int, dict[str, Tensor]]:
        """A cache of zeros for ``length`` positions."""
        return {
            index: {
                "key": self._zeros(batch, length, self.keys[index]),
                "value": self._zeros(batch, length, self.values[index]),
            }
            for index in self.keys
        }

    def taken(self, past: Past) -> dict[int, dict[str, Tensor]]:
        """``past`` as an input of the file: what was computed with more digits is rounded."""
        return {
            index: {kind: tensor.to(self.dtype) for kind, tensor in layer.items()}
            for index, layer in past.items()
        }

    def _zeros(self, batch: int, length: int, sizes: tuple[int, int]) -> Tensor:
        heads, width = sizes
        return torch.zeros(batch, heads, length, width, dtype=self.dtype, device=self.device)


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


def _sizes(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[1], tensor.shape[3]
