"""A copy of a model over the same weights: what every front-end works on.

Structure, buffers and plain attributes are copied; each parameter becomes a new frozen parameter
over the same storage. So nothing that happens to the copy can reach the original, and a model of 7
billion parameters is not held twice.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.formats.copies import drop_repr, keep_exact, quantized_twin, share_states
from lora_fx.passes.graph.following import follow
from lora_fx.passes.graph.lazy import is_lazy

__all__ = ["check_model", "memory_of", "share_copy", "storage_of"]


_EMPTY = (dict, OrderedDict)
_PLAIN = (bool, int, float, str, type(None))


def share_copy(model: nn.Module) -> nn.Module:
    """Copies a model, sharing its parameters' storage.

    Args:
        model: Any module. It is not touched.

    Returns:
        A module of the same class, with every parameter frozen and ties kept. Buffers have storage
        of their own.

    Raises:
        CaptureError: If the model cannot be copied, or the copy would still use parts of the original.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    parameters: list[nn.Parameter] = []
    # Tensors made under inference mode could not be trained on.
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            renormalises = getattr(module, "max_norm", None) is not None
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                parameters.append(parameter)
                if is_lazy(parameter):
                    continue  # it has no storage to share, and copies itself
                if id(parameter) not in memo:
                    twin = quantized_twin(parameter, memo)
                    memo[id(parameter)] = (
                        twin if twin is not None else _frozen(parameter, own=renormalises)
                    )
            share_states(module, memo)
            for value in (*module.__dict__.values(), *module._buffers.values()):
                if type(value) in _EMPTY and not value and not getattr(value, "__dict__", None):
                    # What modules have most of: deepcopy takes the long way for each.
                    memo[id(value)] = type(value)()
                elif type(value) not in _PLAIN:
                    _detach_results(value, memo)
        result = _copied(model, memo)
    follow(result, memo, (*modules, *parameters))
    for module in result.modules():
        keep_exact(module)
        drop_repr(module)
        for own in module._parameters.values():
            # A module that copies itself in its own way may have made new ones.
            if own is not None:
                own.requires_grad = False
    return result


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). "
            "lora_fx never changes its argument, so it needs a model that copy.deepcopy can copy."
        ) from error


def check_model(model: object) -> None:
    """Refuses what cannot be captured at all.

    Raises:
        CaptureError: If it is not a module, or lies on several devices.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module: pass the model that it was made from"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch._dynamo"):
            raise CaptureError(
                f"{name or 'the model'} is compiled: pass the module that it was made from (its "
                "_orig_mod), and compile the result"
            )
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(
            f"the model's parameters are on several devices ({where}): move it to one with "
            "model.to(device)"
        )


def _frozen(parameter: nn.Parameter, own: bool = False) -> nn.Parameter:
    shared = parameter.detach().clone() if own else parameter.detach()
    result = (
        shared if isinstance(shared, nn.Parameter) else nn.Parameter(shared, requires_grad=False)
    )
    result.__dict__.update(parameter.__dict__)
    return result


def _detach_results(value: Any, memo: dict[int, Any]) -> None:
    """Prepares copies of what deepcopy refuses: results of autograd that a forward left behind."""
    if isinstance(value, torch.Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            _detach_results(item, memo)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _detach_results(item, memo)


def storage_of(tensor: torch.Tensor) -> int:
    """What tells storages apart. A sparse tensor has none, nor has one that is not initialised."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors that are tied have in common: not only a storage, but the same place in it."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return (id(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
