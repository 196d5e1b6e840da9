"""The reference for readers of other methods: a copy of a model with the changes of its parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_fx.methods import ForeignAdapter

__all__ = ["applied"]


def applied(model: nn.Module, adapter: ForeignAdapter) -> nn.Module:
    """A copy of a model with the changes and the stored parameters of an adapter."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for change in adapter.changes:
            parameter = model.get_parameter(change.parameter)
            value = change.adapted(parameter.detach().clone())
            assert value.shape == parameter.shape
            assert value.dtype == parameter.dtype
            parameter.copy_(value)
        state = model.state_dict()
        for name, value in adapter.whole.items():
            state[name].copy_(value)
    return model
