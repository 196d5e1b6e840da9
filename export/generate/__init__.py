"""Text generation over an exported decoder, token for token as transformers."""

from __future__ import annotations

from lora_fx.export.generate.generation import Generates

__all__ = [
    "Generates",
]
