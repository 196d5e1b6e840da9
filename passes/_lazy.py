"""Parameters of lazy layers that have not run yet: they have no shape, and refuse every question about it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

__all__ = ["UNINITIALISED", "elements", "is_lazy", "is_matrix", "is_uninitialised"]

UNINITIALISED = "its weights are not initialised yet: run the model once, then rewrite it"


def is_lazy(parameter: Tensor | None) -> bool:
    """Whether the shape of a parameter is not known yet. Unlike torch's, it narrows no type."""
    return isinstance(parameter, UninitializedParameter | UninitializedBuffer)


def is_uninitialised(module: nn.Module) -> bool:
    """Whether the shapes of a lazy layer's own parameters are not known yet."""
    return any(is_lazy(p) for p in module._parameters.values())


def is_matrix(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter has two or more dimensions, as far as one knows."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() > 1


def elements(parameter: nn.Parameter) -> int:
    """Number of elements; 0 where it is not known yet."""
    return 0 if is_lazy(parameter) else parameter.numel()
