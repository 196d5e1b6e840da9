"""The values of a site's weight, whatever it is stored in."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.formats.weights import dense
from lora_fx.ir.values import Site
from lora_fx.passes.parameters.own import weight_at

__all__ = ["base_dtype", "base_like", "base_weight"]


def base_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """The weight in the layout of the site: the parameter's own memory, or values made of few bits."""
    weight = weight_at(model, site.weight)
    if site.quantized is None:
        return weight.detach()
    # Not detached: the scales are attributes of the parameter.
    values = dense(weight)
    return values if site.layout == "out_in" else values.T


def base_like(model: nn.Module, site: Site) -> torch.Tensor:
    """What :func:`base_weight` gives, for whoever asks nothing of its values: few bits stay few."""
    weight = weight_at(model, site.weight)
    if site.quantized is None:
        return weight.detach()
    one = torch.empty((), dtype=site.quantized.dtype, device=weight.device)
    return one.expand(site.weight_shape)


def base_dtype(model: nn.Module, site: Site) -> torch.dtype:
    """What the values of a site's weight are."""
    if site.quantized is not None:
        return site.quantized.dtype
    return weight_at(model, site.weight).dtype
