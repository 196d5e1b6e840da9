"""Pictures of models, graphs and plans."""

from __future__ import annotations

from lora_fx.tools.draw.drawing import FORMATS, visualize

__all__ = ["FORMATS", "visualize"]
