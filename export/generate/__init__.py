"""Text generation over an exported decoder, token for token as transformers."""

from __future__ import annotations

from lora_fx.export.generate.decoding import DecoderFile
from lora_fx.export.generate.generation import Generates

__all__ = [
    "DecoderFile",
    "Generates",
]
