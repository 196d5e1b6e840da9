"""Targets: runtimes that load a folder instead of a single ONNX file. Each module has one target.

:mod:`lora_fx.export.targets.programs` has the code that targets without an ONNX file share.
"""

from __future__ import annotations

from typing import Final

from lora_fx.errors import ExportError, hint
from lora_fx.export.targets.base import RuntimeTarget, TaskName, Written
from lora_fx.export.targets.executorch import ExecutorchTarget
from lora_fx.export.targets.genai import GenaiTarget
from lora_fx.export.targets.openvino import OpenVinoTarget
from lora_fx.export.targets.programs import ProgramTarget, TracedProgram
from lora_fx.export.targets.transformers_js import TransformersJsTarget

__all__ = [
    "TARGETS",
    "ProgramTarget",
    "RuntimeTarget",
    "TaskName",
    "TracedProgram",
    "Written",
    "find_runtime",
]

TARGETS: Final[dict[str, RuntimeTarget]] = {
    target.name: target
    for target in (GenaiTarget(), TransformersJsTarget(), OpenVinoTarget(), ExecutorchTarget())
}


def find_runtime(name: object) -> RuntimeTarget:
    """Return the target of a name.

    Raises:
        ExportError: There is no such target.
    """
    if not isinstance(name, str) or name not in TARGETS:
        near = hint(str(name), TARGETS, "did you mean {!r}? ")
        raise ExportError(
            f"target={name!r} is unknown; {near}leave it out for a plain file, or give one of "
            f"{', '.join(map(repr, TARGETS))}"
        )
    return TARGETS[name]
