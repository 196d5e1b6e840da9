"""State of a module that runs again in the backward: it computes as in its forward."""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.kernels import lazy_copy

__all__ = ["Replay"]


class _Buffer(NamedTuple):
    """A buffer before the forward.

    Attributes:
        holder: The buffers of its module.
        name: Its name there.
        tensor: The tensor.
        values: Its values, which share memory with the tensor until it is written.
        state: What changes with a write into the tensor.
    """

    holder: MutableMapping[str, Any]
    name: str
    tensor: Tensor
    values: Tensor
    state: tuple[int, int]


class Replay:
    """Context in which a module computes as it did when this object was created.

    Training modes and buffers are those of that time, and afterwards again those of now. So statistics of a
    batch norm are updated once. A graph that is kept for two backwards enters the context twice.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = [*map(id, module.parameters())]
        self._modes = [(part, part.training) for part in module.modules()]
        self._buffers = [
            _Buffer(part._buffers, name, tensor, lazy_copy(tensor), _state(tensor))
            for part in module.modules()
            for name, tensor in part._buffers.items()
            if tensor is not None
        ]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        if [*map(id, self._module.parameters())] != self._parameters:
            raise ConfigError(
                f"memory='least': parameters of this {type(self._module).__name__} were replaced between "
                "forward and backward, as torch.func.functional_call and set_adapter do: run the backward "
                "before, or use memory='balanced'"
            )
        for part, training in self._modes:
            if part.training != training:
                self._stack.callback(setattr, part, "training", part.training)
                part.training = training
        with torch.no_grad():
            for buffer in self._buffers:
                self._stack.callback(
                    buffer.holder.__setitem__, buffer.name, buffer.holder[buffer.name]
                )
                buffer.holder[buffer.name] = buffer.tensor
                now = lazy_copy(buffer.tensor)
                self._stack.callback(_restore, buffer.tensor, now, _state(buffer.tensor))
                _restore(buffer.tensor, buffer.values, buffer.state)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _restore(tensor: Tensor, values: Tensor, state: tuple[int, int]) -> None:
    """Write values into a tensor if it was written since it had a state."""
    if _state(tensor) != state:
        with torch.no_grad():
            tensor.copy_(values)


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return what changes with a write. The kernels of batch norms do not bump the version counter."""
    return torch_private.version_counter(tensor), torch_private.data_address(tensor)
