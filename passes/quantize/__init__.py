"""Stores the weights of linear operations in a few bits."""

from __future__ import annotations

from lora_fx.passes.quantize.planning import QuantizationPlan, plan_quantization
from lora_fx.passes.quantize.store import Materialize, Quantize, Values

__all__ = ["Materialize", "QuantizationPlan", "Quantize", "Values", "plan_quantization"]
