"""What the factors of a site hold before training."""

from __future__ import annotations

import hashlib
import math

import torch

from lora_fx.config import LoraConfig
from lora_fx.passes._factors import adapter_dtype
from lora_fx.types import Factors, Site

__all__ = ["initial_factors"]


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
    digest = hashlib.blake2b(f"{config.seed}:{site.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

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
