"""Adapter kinds: what is trained at a site, and what that costs."""

from __future__ import annotations

from lora_fx.kinds.variants import makes_base_again, variant_costs, variant_objection

__all__ = [
    "makes_base_again",
    "variant_costs",
    "variant_objection",
]
