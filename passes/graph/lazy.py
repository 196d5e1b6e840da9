"""Parameters of lazy layers that have not run yet: they have no shape, and refuse every question about it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lora_fx.formats import quantization_of

__all__ = ["UNINITIALIZED", "elements", "is_lazy", "is_matrix", "is_uninitialized"]

UNINITIALIZED = "its weights are not initialized yet: run the model once, then rewrite it"


def is_lazy(parameter: Tensor | None) -> bool:
    """Whether the shape of a parameter is not known yet. Unlike torch's, it narrows no type."""
    # torch asks at length for the rest.
    return type(parameter) is not nn.Parameter and isinstance(
        parameter, UninitializedParameter | UninitializedBuffer
    )


def is_uninitialized(module: nn.Module) -> bool:
    """Whether the shapes of a lazy layer's own parameters are not known yet."""
    return any(is_lazy(p) for p in module._parameters.values())


def is_matrix(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter has two or more dimensions, as far as one knows."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() > 1


def elements(parameter: Tensor) -> int:
    """Number of elements, of values for a quantized weight; 0 where it is not known yet."""
    if is_lazy(parameter):
        return 0
    stored = quantization_of(parameter)
    return parameter.numel() if stored is None else math.prod(stored.shape)
