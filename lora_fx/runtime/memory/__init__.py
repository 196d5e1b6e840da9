"""Ways to save memory in a training step: recomputed blocks, tiles of tokens, block inputs on the host."""

from __future__ import annotations

from lora_fx.runtime.memory import blocks, spans, tiles
from lora_fx.runtime.memory.spans import LazyTensor, Source, lazy_result

__all__ = [
    "LazyTensor",
    "Source",
    "blocks",
    "lazy_result",
    "spans",
    "tiles",
]
