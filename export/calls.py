"""What a call of a file gives, by the names of its inputs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lora_fx.errors import ExportError

__all__ = ["inputs_by_name"]


def inputs_by_name(inputs: Any, names: Sequence[str], file: str) -> dict[str, Any]:
    """Arrays or tensors by name, however they were given.

    Args:
        inputs: By name, in the order of ``names``, or a single one.
        names: The inputs of the file.
        file: Its name, for messages.

    Raises:
        ExportError: One is missing or unknown, with the nearest name that there is.
    """
    if isinstance(inputs, (Tensor, np.ndarray)):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping):
        if not isinstance(inputs, Sequence):
            raise ExportError(
                f"inputs are a {type(inputs).__name__}: give arrays or tensors, by name "
                f"({', '.join(names)}) or in this order"
            )
        if len(inputs) != len(names):
            raise ExportError(
                f"{file} takes {len(names)} inputs ({', '.join(names)}), {len(inputs)} were given"
            )
        inputs = dict(zip(names, inputs, strict=True))
    missing = [name for name in names if name not in inputs]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        raise ExportError(_message(file, names, missing, unknown))
    return {name: inputs[name] for name in names}


def _message(file: str, names: Sequence[str], missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {', '.join(missing)}")
    for name in unknown:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has '{name}', which is no input{hint}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"
