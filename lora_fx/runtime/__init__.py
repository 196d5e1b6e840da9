"""Code that runs in a rewritten model: fused products, losses, rows of samples, and the check of weights."""

from __future__ import annotations

from lora_fx.runtime import attention, experts, watch
from lora_fx.runtime.captured import in_place, output_padding
from lora_fx.runtime.effective import CHANGES, EffectiveWeight, base_parameter, effective_weight
from lora_fx.runtime.watch import CODE, GRAPH, Hooked, disarm, entry, is_checked, places_of

__all__ = [
    "CHANGES",
    "CODE",
    "GRAPH",
    "EffectiveWeight",
    "Hooked",
    "attention",
    "base_parameter",
    "disarm",
    "effective_weight",
    "entry",
    "experts",
    "in_place",
    "is_checked",
    "output_padding",
    "places_of",
    "watch",
]
