"""Context in which a module that runs again in the backward has the state of its forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.kernels import lazy_copy

__all__ = ["Replay"]


class _Buffer(NamedTuple):
    """State of a buffer before the forward.

    Attributes:
        holder: The dictionary of buffers of the module that has the buffer.
        name: Name of the buffer, its key in ``holder``.
        tensor: The tensor.
        values: Lazy copy of the tensor. Both share memory until the tensor is written.
        state: The result of :func:`_state` for the tensor.
    """

    holder: MutableMapping[str, Any]
    name: str
    tensor: Tensor
    values: Tensor
    state: tuple[int, int]


class Replay:
    """Context in which a module computes as it did when this object was created.

    Inside the context, training modes and buffers have their values of that time. On exit they get their
    newer values back, so that the statistics of a batch norm are updated once. The context can be entered
    again, for a graph that is kept for two backwards.
    """

    def __init__(
        self,
        module: nn.Module,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Record the state of a module.

        Args:
            module: The module.
            around: Returns a context to enter as well.
        """
        self._module, self._around = module, around
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._around())
            for part, training in self._modes:
                if part.training != training:
                    stack.callback(setattr, part, "training", part.training)
                    part.training = training
            for buffer in self._buffers:
                stack.callback(buffer.holder.__setitem__, buffer.name, buffer.holder[buffer.name])
                buffer.holder[buffer.name] = buffer.tensor
                with torch.no_grad():
                    now = lazy_copy(buffer.tensor)
                stack.callback(_restore, buffer.tensor, now, _state(buffer.tensor))
                _restore(buffer.tensor, buffer.values, buffer.state)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _restore(tensor: Tensor, values: Tensor, state: tuple[int, int]) -> None:
    """Write values into a tensor, unless it still has the state that belongs to the values."""
    if _state(tensor) != state:
        with torch.no_grad():
            tensor.copy_(values)


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return the version counter and the address of a tensor. A write changes at least one of them.

    The kernels of batch norms do not bump the counter. After a lazy copy, their write changes the address.
    """
    return torch_private.version_counter(tensor), torch_private.data_address(tensor)
