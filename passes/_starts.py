"""What the factors of a site hold before training."""

from __future__ import annotations

import hashlib
import math

import torch

from lora_fx import dora
from lora_fx.config import LoraConfig
from lora_fx.passes._factors import adapter_dtype
from lora_fx.types import Factors, PlannedSite, Site

__all__ = ["initial_bias", "initial_factors", "initial_magnitude"]


def initial_factors(
    site: Site, shapes: Factors, weight: torch.Tensor, config: LoraConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B at the start, from a generator of the site's own.

    Hu et al. 2021 (arXiv:2106.09685): one factor random, the other zero. The distributions are
    PEFT's.
    """
    dtype, a, b = adapter_dtype(weight), shapes.a, shapes.b
    if weight.device.type == "meta":
        return torch.empty(a, dtype=dtype, device="meta"), torch.empty(
            b, dtype=dtype, device="meta"
        )
    generator = _generator(config.seed, site.name)

    def uniform(shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
        # Kaiming with a = sqrt(5): the bound is 1/sqrt(fan_in).
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if site.family == "embedding":
        random_b = normal(b, 1.0)
        first = normal(a, 1.0) if config.init_lora_weights is False else torch.zeros(a)
        second = random_b
    else:
        gaussian = config.init_lora_weights == "gaussian"
        first = normal(a, 1 / shapes.rank) if gaussian else uniform(a, shapes.fan_in[0])
        second = (
            uniform(b, shapes.fan_in[1]) if config.init_lora_weights is False else torch.zeros(b)
        )
    return first.to(weight.device, dtype), second.to(weight.device, dtype)


def initial_magnitude(
    row: PlannedSite, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``‖W + s·BA‖``: the gain is 1 to the last bit before training.

    Liu et al. 2024 (arXiv:2402.09353), equation 5.

    Args:
        row: The site.
        weight: Its weight.
        a: A, as it is stored.
        b: B, likewise.

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
    applied = dora.applied_weight(weight, site.layout, site.view, site.rows)
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
        bias.uniform_(-bound, bound, generator=_generator(config.seed, f"{site.name}.lora_bias"))
    return bias.to(weight.device, dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
