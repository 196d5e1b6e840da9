"""Parameters in another precision, each of them cast once."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

__all__ = ["Casts"]


class Casts:
    """Casts parameters; those over the same memory become one parameter.

    So tied weights stay tied, and copies of one model that share its weights share the cast ones, too.

    Args:
        keep: Takes each tensor that is made, see ``Scratch.keep``.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        # The source is held so that no other tensor comes to lie at its address.
        self._made: dict[Hashable, tuple[Tensor, nn.Parameter]] = {}

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A frozen parameter of ``dtype`` with the values of ``parameter``."""
        key = (_memory(parameter), dtype)
        if key not in self._made:
            cast = nn.Parameter(self.keep(parameter.detach().to(dtype)), requires_grad=False)
            self._made[key] = parameter, cast
        return self._made[key][1]


def _memory(tensor: Tensor) -> Hashable:
    # A subclass (a quantised weight) or an empty tensor may have no address.
    if type(tensor) is not nn.Parameter or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
