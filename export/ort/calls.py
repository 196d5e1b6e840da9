"""What a call of a file gives: by the names of its inputs, and in sizes that go together."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.ort.ports import Port

__all__ = ["AXIS_LIMITS_KEY", "check_axes", "inputs_by_name"]

AXIS_LIMITS_KEY = "lora_fx.axis_limits"
"""In the metadata: JSON of the largest size of each axis that has one."""


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


def check_axes(
    ports: Sequence[Port],
    given: Mapping[str, Any],
    limits: Mapping[str, int],
    file: str,
    *,
    task: bool = False,
) -> None:
    """Refuse sizes that the file does not take, which ONNX Runtime may answer with other values.

    It takes memory of one value for another where their axes have one name.

    Args:
        ports: The inputs.
        given: Arrays or tensors by name, of the right ranks.
        limits: The largest size of an axis, by its name.
        file: Its name, for messages.
        task: Whether the axes are those of a decoder with its cache.

    Raises:
        ExportError: Two axes of one name have two sizes, or an axis is too long.
    """
    seen: dict[str, tuple[int, str]] = {}
    for port in ports:
        for index, (axis, size) in enumerate(zip(port.shape, given[port.name].shape, strict=True)):
            if not isinstance(axis, str):
                continue
            place = f"axis {index} of '{port.name}'"
            known, where = seen.setdefault(axis, (size, place))
            if size != known:
                raise ExportError(
                    f"{file} has one '{axis}' for {where} and {place}, and they have {known} and {size}: "
                    "give both the same size"
                )
            if size > limits.get(axis, size):
                raise ExportError(
                    f"{place} has {size}, and the model takes at most {limits[axis]} ('{axis}'): give less, "
                    "or cut it"
                )
    if task and "total_length" in seen:
        (total, where), past, new = (
            seen["total_length"],
            seen["past_length"][0],
            seen["sequence"][0],
        )
        if total != past + new:
            raise ExportError(
                f"{where} has {total}, and it covers the past and the new tokens: {past} + {new}"
            )


def _message(file: str, names: Sequence[str], missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {', '.join(missing)}")
    for name in unknown:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has '{name}', which is no input{hint}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"
