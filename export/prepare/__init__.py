"""From the caller's model and example to a model and a call that can be traced."""

from __future__ import annotations

from lora_fx.export.prepare.preparing import Prepared, prepare, prepare_swappable

__all__ = [
    "Prepared",
    "prepare",
    "prepare_swappable",
]
