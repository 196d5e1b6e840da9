"""Fused products with branches, and their parts: masks, norms, recomputed inputs, Triton kernels."""

from __future__ import annotations

from lora_fx.runtime.kernels import branch, deployed, fused_lora, masks, recompute
from lora_fx.runtime.kernels.fused_lora import (
    Kernel,
    Rows,
    add_product,
    autocast_dtype,
    cast,
    flat,
    quantized_kernel,
    without_autocast,
    writable,
)
from lora_fx.runtime.kernels.masks import TileMasks, draw, masked, recovery, transformed, unpacked
from lora_fx.runtime.kernels.recompute import Source, Subgraph, autocast_of, lazy_copy, source_of

__all__ = [
    "Kernel",
    "Rows",
    "Source",
    "Subgraph",
    "TileMasks",
    "add_product",
    "autocast_dtype",
    "autocast_of",
    "branch",
    "cast",
    "deployed",
    "draw",
    "flat",
    "fused_lora",
    "lazy_copy",
    "masked",
    "masks",
    "quantized_kernel",
    "recompute",
    "recovery",
    "source_of",
    "transformed",
    "unpacked",
    "without_autocast",
    "writable",
]
