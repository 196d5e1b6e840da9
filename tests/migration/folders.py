"""Folders of tiny models and adapters whose values follow from the names of their tensors.

So a file needs only names and shapes, and both versions of a library have the same values. This module needs
torch and safetensors alone: an environment of transformers 4 imports it, too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
SHOWN = 64
"""The number of values of an output that are kept."""


def values(name: str, shape: Sequence[int]) -> Tensor:
    """Return numbers between -1 and 1 that depend on the name alone."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    mixed = (index * 0x9E3779B1 + zlib.crc32(name.encode())) & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
    mixed = mixed ^ (mixed >> 16)
    return (mixed.double() / 2**31 - 1).float().reshape(tuple(shape))


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """Return the values of a weight, such that no layer hides another."""
    if len(shape) < 2:
        positive = name.endswith(("weight", "running_var", "lambda1"))
        return positive + 0.2 * values(name, shape)
    return values(name, shape) * math.sqrt(3 / max(math.prod(shape[1:]), 1))


def factor(name: str, shape: Sequence[int]) -> Tensor:
    """Return the values of a tensor of an adapter."""
    return values(name, shape) * (0.5 if "lora_B" in name else 1 / math.sqrt(shape[-1]))


def spread(output: Any) -> Tensor:
    """Return evenly spaced values of the logits, or of the first floating-point tensor, of an output."""
    logits = output.get("logits") if hasattr(output, "get") else None
    tensors = [logits] if logits is not None else list(output.values())
    first = next(value for value in tensors if torch.is_tensor(value) and value.is_floating_point())
    flat = first.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, SHOWN).round().long()]


def inputs_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call: integers as they are stored, other numbers by their shape."""
    return {
        name: value
        if not isinstance(value, dict)
        else torch.tensor(value["values"])
        if "values" in value
        else values(name, value["shape"])
        for name, value in stored.items()
    }
