"""Fusions: a converted graph is rewritten into one that computes the same in less time.

Each file has one family. A fusion is found by what a graph computes, whatever model it came from.
"""

from lora_fx.export.fuse.fused_attention import (
    ONE_ROW_CHUNKS_KEY,
    SHARED_CACHE_KEY,
    check_attention,
)
from lora_fx.export.fuse.pipeline import (
    FUSIONS,
    Fused,
    Level,
    Provider,
    Target,
    check_target,
    fuse,
    fusion_table,
)

__all__ = [
    "FUSIONS",
    "ONE_ROW_CHUNKS_KEY",
    "SHARED_CACHE_KEY",
    "Fused",
    "Level",
    "Provider",
    "Target",
    "check_attention",
    "check_target",
    "fuse",
    "fusion_table",
]
