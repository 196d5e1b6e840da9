"""What a task makes of a model: the files to write, and how each is called and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx.export.trace import Cases

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        name: "" for the file that a session opens, else what it holds ("encoder").
        call: How the model is called: ``call(model, **inputs)``.
        inputs: The example call; its nested mappings become names with dots.
        dynamic_shapes: Input name to its dynamic axes; None to find out which can be.
        cases: Calls to check, or None to draw them by axis.
        metadata: Goes into the file.
    """

    name: str
    call: Callable[..., object]
    inputs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None
    cases: Cases | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
