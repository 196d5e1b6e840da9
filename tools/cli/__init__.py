"""The command line."""

from __future__ import annotations

from lora_fx.tools.cli.entry import main

__all__ = ["main"]
