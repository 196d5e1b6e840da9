"""The linear operations that lora_fx knows, and the registry of them."""

from __future__ import annotations

from lora_fx.passes.patterns.embedding import lookup
from lora_fx.passes.patterns.linear import ARGUMENTS, Product, product_of
from lora_fx.passes.patterns.registry import (
    ConvPattern,
    ConvTransposePattern,
    EinsumPattern,
    EmbeddingPattern,
    ExpertsPattern,
    LinearPattern,
    make_site,
    pattern_of,
    patterns,
    register_pattern,
)
from lora_fx.passes.patterns.sites import itemised, part_names, site_name
from lora_fx.passes.patterns.weights import CHUNKS, SPLIT, constant_of, splits, weight_of

__all__ = [
    "ARGUMENTS",
    "CHUNKS",
    "SPLIT",
    "ConvPattern",
    "ConvTransposePattern",
    "EinsumPattern",
    "EmbeddingPattern",
    "ExpertsPattern",
    "LinearPattern",
    "Product",
    "constant_of",
    "itemised",
    "lookup",
    "make_site",
    "part_names",
    "pattern_of",
    "patterns",
    "product_of",
    "register_pattern",
    "site_name",
    "splits",
    "weight_of",
]
