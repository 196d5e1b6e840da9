"""Passes that find linear operations, output head, routers, parts of fused weights, readers of weights."""

from __future__ import annotations

from lora_fx.passes.match.find_operations import FindOperations, ask
from lora_fx.passes.match.marks import LOSSES, MARKS

__all__ = ["LOSSES", "MARKS", "FindOperations", "ask"]
