"""Finds linear operations, the output head, routers, parts of fused weights, and readers of weights."""

from __future__ import annotations

from lora_fx.passes.match.find_operations import FindOperations, match
from lora_fx.passes.match.head import MarkHead, find_head
from lora_fx.passes.match.parts import MarkParts, find_parts
from lora_fx.passes.match.readers import weights_asked
from lora_fx.passes.match.routers import MarkRouters, find_routers

__all__ = [
    "FindOperations",
    "MarkHead",
    "MarkParts",
    "MarkRouters",
    "find_head",
    "find_parts",
    "find_routers",
    "match",
    "weights_asked",
]
