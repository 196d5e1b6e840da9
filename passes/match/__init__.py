"""Finds linear operations, the output head, routers, parts of fused weights, and readers of weights."""

from __future__ import annotations

from lora_fx.passes.match.find_operations import FindOperations
from lora_fx.passes.match.marks import LOSSES, MARKS
from lora_fx.passes.match.readers import weights_asked

__all__ = ["LOSSES", "MARKS", "FindOperations", "weights_asked"]
