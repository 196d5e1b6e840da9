"""One export at a time, in all of a process."""

from __future__ import annotations

import threading

__all__ = ["ONE_AT_A_TIME"]

ONE_AT_A_TIME = threading.RLock()
"""Held by whoever runs ``torch.export`` or the ONNX exporter.

Both keep what they are at in global state, and a capture by ``torch.export`` takes notes by way of classes
that other models have as well (:mod:`lora_fx.passes.capture.noting`). An export to ONNX may capture in
between, in the same thread.
"""
