"""Copies of the caller's model that can be traced."""

from __future__ import annotations

from lora_fx.export.copy.packing import pack_quantized, stored_formats
from lora_fx.export.copy.quantized_weight import StandIn
from lora_fx.export.copy.twin import DTYPES, Casts, dtype_name, exportable_twin, unwrapped

__all__ = [
    "DTYPES",
    "Casts",
    "StandIn",
    "dtype_name",
    "exportable_twin",
    "pack_quantized",
    "stored_formats",
    "unwrapped",
]
