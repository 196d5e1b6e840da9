"""A copy of a model over the same weights: what every front-end works on.

Structure, buffers and plain attributes are copied; each parameter becomes a new frozen parameter over
the same storage. So nothing that happens to the copy can reach the original, and a model of 7 billion
parameters is not held twice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError

__all__ = ["check_model", "share_copy"]


def share_copy(model: nn.Module) -> nn.Module:
    """Copies a model, sharing its parameters' storage.

    Args:
        model: Any module. It is not touched.

    Returns:
        A module of the same class, with every parameter frozen and ties kept. Buffers have storage
        of their own.

    Raises:
        CaptureError: If the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _frozen(parameter)
        for value in module.__dict__.values():
            # deepcopy refuses results of autograd that a forward left behind.
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
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
        CaptureError: If it is not a module, has uninitialised parameters, or lies on several devices.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a TorchScript module: pass the model that it was made from"
        )
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(
                f"{name} is not initialised yet: run one batch through the model before capturing it"
            )
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise CaptureError(
            f"the model's parameters are on several devices ({where}): move it to one with model.to(device)"
        )


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    shared = parameter.detach()
    result = (
        shared if isinstance(shared, nn.Parameter) else nn.Parameter(shared, requires_grad=False)
    )
    result.__dict__.update(parameter.__dict__)
    return result
