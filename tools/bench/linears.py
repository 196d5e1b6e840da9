"""Linear layers of a model, as what is measured beside lora-fx replaces them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import Tensor, nn

__all__ = ["is_linear", "matrix", "replaced", "shared_copy"]


def is_linear(module: nn.Module) -> bool:
    """Whether it is ``nn.Linear`` or the ``Conv1D`` of transformers, which stores its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer, [out, in]."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.T


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters, which are frozen."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo).requires_grad_(False)


def replaced(
    model: nn.Module, names: Iterable[str], layer: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """A copy over the same parameters, with other layers in the place of some.

    Args:
        model: The base.
        names: Which layers.
        layer: Makes the new one of the old one.
    """
    found = shared_copy(model)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(found.get_submodule(parent), attribute, layer(found.get_submodule(name)))
    return found
