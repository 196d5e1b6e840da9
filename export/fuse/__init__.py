"""Fusions: rewrites of a converted graph that compute the same results in less time.

Each module has one family of fusions. They match patterns of a graph, not classes of models.
"""

from lora_fx.export.fuse.adapters import ADAPTER_NODES_KEY, adapter_nodes, guard_ids, guard_sizes
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
    "ADAPTER_NODES_KEY",
    "FUSIONS",
    "ONE_ROW_CHUNKS_KEY",
    "SHARED_CACHE_KEY",
    "Fused",
    "Level",
    "Provider",
    "Target",
    "adapter_nodes",
    "check_attention",
    "check_target",
    "fuse",
    "fusion_table",
    "guard_ids",
    "guard_sizes",
]
