"""Compares a written file with PyTorch."""

from __future__ import annotations

from lora_fx.export.verify.difference import PrecisionError
from lora_fx.export.verify.verifying import Parity, Verdict, verify

__all__ = [
    "Parity",
    "PrecisionError",
    "Verdict",
    "verify",
]
