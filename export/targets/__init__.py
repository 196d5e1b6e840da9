"""Folders for runtimes that want more than an ONNX file: one file each."""

from __future__ import annotations

from typing import Final

from lora_fx.errors import ExportError, hint
from lora_fx.export.targets.base import RuntimeTarget, Written
from lora_fx.export.targets.genai import GenaiTarget
from lora_fx.export.targets.transformers_js import TransformersJsTarget

__all__ = ["TARGETS", "RuntimeTarget", "Written", "find_runtime"]

TARGETS: Final[dict[str, RuntimeTarget]] = {
    one.name: one for one in (GenaiTarget(), TransformersJsTarget())
}


def find_runtime(name: object) -> RuntimeTarget:
    """The target of this name.

    Raises:
        ExportError: If there is none.
    """
    if not isinstance(name, str) or name not in TARGETS:
        near = hint(str(name), TARGETS, "did you mean {!r}? ")
        raise ExportError(
            f"target={name!r} is unknown; {near}leave it out for a plain file, or give one of "
            f"{', '.join(map(repr, TARGETS))}"
        )
    return TARGETS[name]
