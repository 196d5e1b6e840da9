"""The linear operations that lora_fx knows, and the registry of them."""

from __future__ import annotations

from lora_fx.passes.patterns.embedding import EmbeddingPattern, lookup
from lora_fx.passes.patterns.linear import ARGUMENTS, LinearPattern, Product, product_of
from lora_fx.passes.patterns.registry import pattern_of, patterns, register_pattern
from lora_fx.passes.patterns.sites import itemised, make_site, part_names, site_name
from lora_fx.passes.patterns.weights import SPLIT, constant_of, part_lengths, splits, weight_of

__all__ = [
    "ARGUMENTS",
    "SPLIT",
    "EmbeddingPattern",
    "LinearPattern",
    "Product",
    "constant_of",
    "itemised",
    "lookup",
    "make_site",
    "part_lengths",
    "part_names",
    "pattern_of",
    "patterns",
    "product_of",
    "register_pattern",
    "site_name",
    "splits",
    "weight_of",
]
