"""Losses that compute the logits of a head a few rows at a time."""

from __future__ import annotations

from lora_fx.runtime.loss import chunked, logits
from lora_fx.runtime.loss.chunked import ROWS, drawing, exact_dtype, generators
from lora_fx.runtime.loss.lazy import LazyHistory, reads_metadata

__all__ = [
    "ROWS",
    "LazyHistory",
    "chunked",
    "drawing",
    "exact_dtype",
    "generators",
    "logits",
    "reads_metadata",
]
