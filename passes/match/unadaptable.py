"""Weights that no adapter can be put on, whatever a graph does with them: each with the reason.

A merge writes ``W + s·BA`` back into the weight. That needs a dense weight of real floating-point numbers,
and one that is not computed anew from others before each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_fx.formats import LibraryLayers, formats, quantization_of
from lora_fx.ir import Rejection, join
from lora_fx.passes.graph import UNINITIALIZED, is_lazy, is_matrix, original_class
from lora_fx.passes.patterns import site_name

__all__ = ["unfit"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
_REMEDY = "adapt the model before it is quantized, merge, and quantize the result"


def unfit(model: nn.Module) -> Iterator[tuple[str, Rejection]]:
    """What cannot be adapted, by the FQN of the weight (of the module, where its weight has no name)."""
    for fqn, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        known = isinstance(module, nn.Linear) and quantization_of(module._parameters.get("weight"))
        cls = original_class(module)
        layers = _library_of(cls)
        foreign = layers is not None or cls.__module__.startswith(_QUANTIZED)
        if foreign and not known and _holds_weights(module):
            named = f"{cls.__module__}.{cls.__qualname__}"
            lacking = None if layers is None else layers.unfinished(module, named)
            reason = lacking or f"it is quantized ({named}): {_REMEDY}"
            yield join(fqn, "weight"), Rejection(fqn, reason, fqn)
            continue
        for name, reason in (*_tensors(module), *_parametrized(module), *_hooked(module)):
            weight = join(fqn, name)
            yield weight, Rejection(site_name(weight), reason, fqn)


def _library_of(cls: type[nn.Module]) -> LibraryLayers | None:
    """The layers that a class is one of."""
    return next((one.layers for one in formats() if one.layers.owns(cls)), None)


def _holds_weights(module: nn.Module) -> bool:
    """Whether a quantized module is a layer, not the holder of packed weights in one."""
    return "Packed" not in original_class(module).__name__


def _tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if is_lazy(parameter):
            if "bias" not in name:
                yield name, UNINITIALIZED
        elif is_matrix(parameter) and (reason := _reason(parameter)):
            yield name, reason
    for name, buffer in module._buffers.items():
        # Other buffers of integers are positions and masks.
        if buffer is not None and buffer.dim() > 1 and "weight" in name:
            small = buffer.dtype not in _FLOATS and not buffer.is_complex()
            if small and (reason := _reason(buffer)):
                yield name, reason


def _reason(weight: torch.Tensor) -> str | None:
    if quantization_of(weight) is not None:
        return None
    if weight.layout is not torch.strided:
        kind = str(weight.layout).removeprefix("torch.")
        return f"its weight is sparse ({kind}), and B A is dense: use a dense weight (to_dense())"
    if weight.is_complex():
        return f"its weight is {weight.dtype}, and an adapter is real"
    if weight.dtype not in _FLOATS:
        what = "a quantized format" if weight.is_floating_point() else "not floating point"
        return f"its weight is {weight.dtype}, {what}: {_REMEDY}"
    held: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    if is_traceable_wrapper_subclass(held):
        inner = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
        if any(t.dtype not in _FLOATS and t.dim() > 1 for t in inner):
            return (
                f"its weight is a {type(held).__name__}, which holds quantized numbers: {_REMEDY}"
            )
    return None


def _parametrized(module: nn.Module) -> Iterator[tuple[str, str]]:
    if not parametrize.is_parametrized(module):
        return
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    for name, steps in parametrizations.items():
        if all(p.dim() < 2 for p in steps.parameters(recurse=False)):
            continue
        how = ", ".join(type(step).__name__.strip("_") for step in steps.children())
        reason = (
            f"its {name} is computed by a parametrization ({how}), into which no merge could fold an "
            "adapter: take it off with torch.nn.utils.parametrize.remove_parametrizations first"
        )
        yield name, reason


def _hooked(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Weights that a hook computes before each call: the older weight_norm, spectral_norm, pruning."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if not isinstance(name, str) or name in module._parameters:
            continue
        sources = [n for n in module._parameters if n in (f"{name}_orig", f"{name}_v", f"{name}_g")]
        if not sources:
            continue
        reason = (
            f"its {name} is computed from {' and '.join(sources)} before each call by a hook "
            f"({type(hook).__name__}), into which no merge could fold an adapter: take it off first "
            "(torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove)"
        )
        yield name, reason
