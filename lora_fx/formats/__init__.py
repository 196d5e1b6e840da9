"""Formats of quantized weights, each as its library stores it."""

from __future__ import annotations

from lora_fx.formats.copies import drop_repr, keep_exact, quantized_twin, share_states
from lora_fx.formats.made import Storage, check_device, storage, stored
from lora_fx.formats.repack import requantized
from lora_fx.formats.state import checks_format, loads_quantised
from lora_fx.formats.weights import dense, quantization_of, quantized_linear

__all__ = [
    "Storage",
    "check_device",
    "checks_format",
    "dense",
    "drop_repr",
    "keep_exact",
    "loads_quantised",
    "quantization_of",
    "quantized_linear",
    "quantized_twin",
    "requantized",
    "share_states",
    "storage",
    "stored",
]
