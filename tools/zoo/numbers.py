"""Outputs of any structure as numbers: how far apart, and whether a model was changed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["difference", "fingerprint", "floats", "in_double", "tensors", "what_changed"]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an output, in order: containers, dataclasses and what libraries make of them."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    elif dataclasses.is_dataclass(value):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for item in items:
        yield from tensors(item)


def floats(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in an output that hold anything."""
    return [t for t in tensors(value) if t.is_floating_point() and t.numel()]


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest value of each tensor.

    Returns:
        0 where no bit differs; infinity where shapes or types do, or only one is finite.
    """
    left, right = list(tensors(found)), list(tensors(expected))
    if [(t.shape, t.dtype) for t in left] != [(t.shape, t.dtype) for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
        if bool(same.all()):
            continue
        a, b = a.detach().double(), b.detach().double()
        apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
        scale = torch.where(b.isfinite(), b.abs(), 0.0).max().clamp_min(1e-30)
        worst = max(worst, float(apart.max() / scale))
    return worst


def in_double(value: Any) -> Any:
    """The inputs with every floating tensor in fp64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_double(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_double(item) for item in value)
    return value


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What must not change: values, modes, gradients, modules and their classes."""
    found = {
        f"class of {name or 'root'}": type(module).__qualname__
        for name, module in model.named_modules()
    }
    found |= {f"mode of {n or 'root'}": str(m.training) for n, m in model.named_modules()}
    for name, parameter in model.named_parameters():
        gradient = "no gradient" if parameter.grad is None else "a gradient"
        found[f"parameter {name}"] = f"{_digest(parameter)} {parameter.requires_grad} {gradient}"
    found |= {f"buffer {name}": _digest(buffer) for name, buffer in model.named_buffers()}
    return found


def what_changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The first few differences of two fingerprints; empty if there are none."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
