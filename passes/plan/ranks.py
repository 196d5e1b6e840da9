"""A planned site at another rank."""

from __future__ import annotations

import dataclasses

from torch import nn

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import scale_of
from lora_fx.ir.values import PlannedSite
from lora_fx.passes.parameters.replacements import base_dtype
from lora_fx.passes.patterns.registry import pattern_of

__all__ = ["at_rank"]


def at_rank(
    model: nn.Module, row: PlannedSite, rank: int, alpha: float, config: LoraConfig
) -> PlannedSite:
    """What a site gets, and what it costs, with another rank and alpha."""
    pattern, site = pattern_of(row.site), row.site
    more = pattern.factors(site, rank).numel - pattern.factors(site, row.rank).numel
    applied = row.flops // pattern.flops(site, row.rank)
    itemsize = base_dtype(model, site).itemsize
    return dataclasses.replace(
        row,
        rank=rank,
        alpha=alpha,
        scale=scale_of(rank, alpha, config),
        parameters=row.parameters + more,
        flops=applied * pattern.flops(site, rank),
        saved=row.saved + (rank - row.rank) * itemsize * applied,
    )
