"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from lora_fx.errors import ExportError, hint
from lora_fx.export.tasks.part import Part
from lora_fx.export.tasks.text2text_generation import TEXT2TEXT_GENERATION, text2text_generation
from lora_fx.export.tasks.text_generation import TEXT_GENERATION, text_generation

__all__ = ["TASKS", "Task", "find_task"]

Task: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], tuple[Part, ...]]
"""From a model in eval mode and example inputs by name to the files, that of the session last."""

TASKS: Mapping[str, Task] = {
    TEXT_GENERATION: text_generation,
    TEXT2TEXT_GENERATION: text2text_generation,
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ExportError: There is none, with the nearest names.
    """
    if name in TASKS:
        return TASKS[name]
    like = str(name).lower().replace("_", "-")
    raise ExportError(
        f"task={name!r} is unknown: the tasks are {', '.join(map(repr, TASKS))}, and without one "
        f"the model is exported as it is called."
        + hint(like, TASKS, " Did you mean '{}'?", count=1, cutoff=0.4)
    )
