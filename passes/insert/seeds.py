"""Random numbers of a site's own: they do not depend on what else is adapted, or was drawn before."""

from __future__ import annotations

import hashlib

import torch

from lora_fx.config.lora_config import LoraConfig

__all__ = ["site_generator"]


def site_generator(name: str, config: LoraConfig) -> torch.Generator:
    """A generator on the CPU, seeded with the configuration's seed and the site's name."""
    digest = hashlib.blake2b(f"{config.seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
