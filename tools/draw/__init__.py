"""Pictures of models, graphs and plans."""

from __future__ import annotations

from lora_fx.tools.draw.drawing import FORMATS, visualize
from lora_fx.tools.draw.page import fill_page

__all__ = ["FORMATS", "fill_page", "visualize"]
