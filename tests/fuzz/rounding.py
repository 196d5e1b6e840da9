"""How far rounding may take a result: stochastic arithmetic on the oracle.

The oracle runs again in fp64, a few times, with the operands of every operation moved at random by as
much as the rounding of the dtype moves them (Vignes 2004, CESTAC). What that does to the outputs is what
rounding does to them, cancellation and all. No constant is chosen by hand but the factor by which the
largest of few samples may be surpassed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FACTOR", "SAMPLES", "Noise"]

SAMPLES = 3
FACTOR = 16.0


class Noise(TorchDispatchMode):
    """Moves the floating-point operands of each operation by random relative errors up to ``unit``."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self._unit = unit
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view or a write needs the tensor itself. Its values are moved where they are used.
        schema = func._schema
        aliases = any(argument.alias_info is not None for argument in schema.arguments)
        if not aliases:
            args, kwargs = pytree.tree_map_only(Tensor, self._moved, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _moved(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.rand(
            value.shape, generator=self._generator, dtype=torch.float64, device=value.device
        )
        return value * (1 + self._unit * (2 * noise - 1)).to(value.dtype)
