"""What a model is exported for: which files, called how."""

from __future__ import annotations

from lora_fx.export.tasks.part import ENCODER_KEY, GENERATION_KEY, TASK_KEY, Part
from lora_fx.export.tasks.registry import find_task

__all__ = ["ENCODER_KEY", "GENERATION_KEY", "TASK_KEY", "Part", "find_task"]
