"""The axes of the inputs: which a caller names, and what each is called in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.export import Dim

from lora_fx.errors import ExportError
from lora_fx.export.trace.arguments import Arguments

__all__ = ["Axis", "axis_name", "given_names"]


@dataclass(frozen=True)
class Axis:
    """One axis of one input.

    Attributes:
        size: Its size in the example.
        name: Its name in the file if it is dynamic, else None.
        symbol: What torch.export calls it if it is dynamic; equal symbols are equal sizes.
        high: The largest size the model takes, None if there is no limit.
        reason: Why it is fixed, "" if it is not.
    """

    size: int
    name: str | None = None
    symbol: str | None = None
    high: int | None = None
    reason: str = ""

    @property
    def label(self) -> int | str:
        """What the file says: the name of a dynamic axis, the size of a fixed one."""
        return self.size if self.name is None else self.name


def given_names(dynamic_shapes: object, arguments: Arguments) -> list[Mapping[int, str]]:
    """What a caller names: for each input its axes, by position, to their names.

    Args:
        dynamic_shapes: As ``export_onnx`` takes it; None for nothing.
        arguments: The call.

    Raises:
        ExportError: It names inputs or axes that are not there.
    """
    names = arguments.names
    if dynamic_shapes is None:
        return [{} for _ in names]
    if isinstance(dynamic_shapes, Mapping):
        unknown = [name for name in dynamic_shapes if name not in names]
        if unknown:
            raise ExportError(
                f"dynamic_shapes names {', '.join(map(repr, unknown))}, but the inputs are "
                f"{', '.join(names)}"
            )
        given = [dynamic_shapes.get(name) for name in names]
    elif isinstance(dynamic_shapes, (tuple, list)) and len(dynamic_shapes) == len(names):
        given = list(dynamic_shapes)
    else:
        raise ExportError(
            f"dynamic_shapes has to be a dict by input name or a sequence of {len(names)} dicts, "
            f"one for each of {', '.join(names)}"
        )
    pairs = zip(given, names, arguments.tensors, strict=True)
    return [_label(spec, name, tensor) for spec, name, tensor in pairs]


def _label(spec: object, name: str, tensor: Tensor) -> dict[int, str]:
    if spec is not None and not isinstance(spec, (Mapping, list, tuple)):
        raise ExportError(f"dynamic_shapes of '{name}' is {spec!r}: give a dict of axis to name")
    entries = spec if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
    labels: dict[int, str] = {}
    for axis, label in entries.items():
        if not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
            raise ExportError(
                f"dynamic_shapes gives axis {axis!r} of '{name}', which has shape "
                f"{list(tensor.shape)}"
            )
        if label is None or label is Dim.STATIC:
            continue
        axis %= tensor.ndim
        own = label if isinstance(label, str) else getattr(label, "__name__", "")
        labels[axis] = own or axis_name(name, axis, tensor)
    return labels


def axis_name(name: str, axis: int, tensor: Tensor) -> str:
    """What a dynamic axis is called that nobody has named.

    Args:
        name: Of the input.
        axis: Its position.
        tensor: The input in the example.
    """
    if axis == 0:
        return "batch"
    if tensor.ndim == 4 and tensor.is_floating_point() and axis > 1:
        return ("height", "width")[axis - 2]
    if axis == 1 and tensor.ndim in (2, 3):
        return "sequence"
    return f"{name}_{axis}"
