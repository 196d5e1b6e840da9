"""What a variant's own parameters hold before training: the magnitude of DoRA, the bias of B."""

from __future__ import annotations

import math

import torch

from lora_fx.config.lora_config import LoraConfig
from lora_fx.ir.values import PlannedSite
from lora_fx.passes.insert.seeds import site_generator
from lora_fx.passes.parameters.factors import adapter_dtype
from lora_fx.runtime import dora

__all__ = ["initial_bias", "initial_magnitude"]


def initial_magnitude(
    row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``‖W + s·BA‖``: the gain is 1 to the last bit before training.

    Liu et al. 2024 (arXiv:2402.09353), equation 5.

    Args:
        row: The site.
        weight: Its weight.
        a: Its A, as it is stored.
        b: Its B, likewise.

    Returns:
        [out], or [1, out, 1, ...] for a convolution, as PEFT stores it.
    """
    site, dtype = row.site, adapter_dtype(weight)
    shape: tuple[int, ...] = (site.out_features,)
    if site.family == "conv":
        shape = (1, site.out_features, *(1 for _ in site.weight_shape[2:]))
    if weight.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if row.tied:
        a, b = a.T, b.T
    applied = dora.applied_weight(weight, site.layout, site.view, site.rows, site.order)
    norm = dora.weight_norm(applied, a, b, row.scale, site.layout, site.groups)
    return norm.reshape(shape).to(dtype)


def initial_bias(row: PlannedSite, weight: torch.Tensor, config: LoraConfig) -> torch.Tensor:
    """Zeros, [out]; uniform as the bias of a layer of this rank where B starts random, too."""
    site, dtype = row.site, adapter_dtype(weight)
    if weight.device.type == "meta":
        return torch.empty(site.out_features, dtype=dtype, device="meta")
    bias = torch.zeros(site.out_features)
    if config.init_lora_weights is False:
        bound = 1 / math.sqrt(row.rank // site.groups)
        bias.uniform_(-bound, bound, generator=site_generator(f"{site.name}.lora_bias", config))
    return bias.to(weight.device, dtype)
