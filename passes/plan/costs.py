"""What an adapter costs at a site, and what it trains there."""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import nn

from lora_fx.ir import PlannedSite
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import base_dtype
from lora_fx.passes.patterns import pattern_of

__all__ = ["priced"]


def priced(model: nn.Module, row: PlannedSite) -> PlannedSite:
    """A planned site with what it costs: trainable elements, FLOPs and bytes saved for backward.

    Args:
        model: The model, rewritten or not.
        row: The site, with its rank, dropout, kind and what it is tied to.
    """
    site, kind = row.site, kind_of(row)
    itemsize = base_dtype(model, site).itemsize
    extra = kind.costs(site)
    parameters, flops, saved = extra.parameters, extra.flops, extra.saved * itemsize
    if kind.low_rank:
        pattern = pattern_of(site)
        parameters += 0 if row.tied else pattern.factors(site, row.rank).numel
        flops += pattern.flops(site, row.rank)
        # An index is saved as it is; a vector a second time, masked, with its mask, for dropout.
        saved += 8 if site.family == "embedding" else site.in_features * itemsize
        saved += site.in_features * (itemsize + 1) if row.dropout else 0
        saved += row.rank * itemsize
    # A region of a whole model and the regions below it show the same application twice.
    applied = max(Counter(call.region for call in site.calls).values())
    return dataclasses.replace(
        row, parameters=parameters, flops=flops * applied, saved=saved * applied
    )
