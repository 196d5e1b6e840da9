"""Where the factors of a planned site are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.ops import AdapterFactors, Holder, KeptTensors
from lora_fx.passes.patterns import pattern_of
from lora_fx.types import PlannedSite

__all__ = [
    "adapter_dtype",
    "adapter_parameters",
    "drop_factors",
    "factor_names",
    "factors_of",
]


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """The factors' dtype: that of the weight, or fp32 for a weight of less precision."""
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32


def factor_names(row: PlannedSite) -> tuple[str, str]:
    """The attributes of the site's holder that have A and B.

    A head whose weight is tied to an embedding has the embedding's, and they change places: what is
    ``B`` there is, transposed, its A.
    """
    if row.tied:
        return "lora_embedding_B", "lora_embedding_A"
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    return shapes.name_a, shapes.name_b


def factors_of(
    model: nn.Module, row: PlannedSite, adapter: str
) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters of :func:`factor_names`, as they are stored."""
    holder = model.get_submodule(row.site.holder)
    a, b = (holder.get_submodule(name).get_parameter(adapter) for name in factor_names(row))
    return a, b


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """The factors of an adapter, and whatever else it trains beside them, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdapterFactors) and not isinstance(module, KeptTensors):
            parameter = module._parameters.get(adapter)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def drop_factors(model: nn.Module, adapter: str) -> None:
    """Forgets all that an adapter has in a model; what holds nothing any more goes, too."""
    for module in reversed(list(model.modules())):
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterFactors):
                child._parameters.pop(adapter, None)
                child._buffers.pop(adapter, None)
                if not child._parameters and not child._buffers:
                    del module._modules[name]
            if isinstance(child, Holder) and not child._modules:
                del module._modules[name]
