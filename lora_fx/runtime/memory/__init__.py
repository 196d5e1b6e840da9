"""Steps that keep less memory: blocks that run again, tiles of tokens, inputs on the host."""

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
