"""Finds linear operations, the output head, parts of fused weights, and readers of weights."""

from __future__ import annotations

from lora_fx.passes.match.find_operations import FindOperations
from lora_fx.passes.match.head import MarkHead
from lora_fx.passes.match.parts import MarkParts
from lora_fx.passes.match.readers import weights_asked

__all__ = ["FindOperations", "MarkHead", "MarkParts", "weights_asked"]
