"""From an exported program to an ONNX graph that is fit to ship."""

from __future__ import annotations

from lora_fx.export.convert.converting import ConversionError, convert, torch_export_context

__all__ = [
    "ConversionError",
    "convert",
    "torch_export_context",
]
