"""Sessions: exported files that are loaded and run."""

from __future__ import annotations

from lora_fx.export.session.onnx_session import OnnxSession

__all__ = [
    "OnnxSession",
]
