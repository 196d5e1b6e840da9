"""Compares a written file with PyTorch."""

from __future__ import annotations

from lora_fx.export.verify.verifying import Parity, PrecisionError, verify

__all__ = [
    "Parity",
    "PrecisionError",
    "verify",
]
