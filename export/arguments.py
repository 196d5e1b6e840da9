"""A call on which a file is compared with PyTorch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim

from lora_fx.errors import ExportError

__all__ = [
    "Arguments",
    "Axis",
    "Case",
    "Cases",
    "Checked",
    "Extra",
    "FlatModel",
    "Outputs",
    "Sizes",
    "axis_name",
    "cast_floating",
    "given_names",
    "named_outputs",
]


@dataclass(frozen=True)
class _Slot:
    index: int


@dataclass(frozen=True)
class Arguments:
    """One call of a model, its tensors apart from the structure around them.

    Attributes:
        args: Positional arguments with a slot in place of each tensor.
        kwargs: Keyword arguments, likewise.
        names: Name of each tensor: that of the parameter, with ``_0``, ``_1``, … inside a list and
            ``.key`` inside a mapping.
        tensors: The tensors, in the order of the slots.
        baked: Name to value of the arguments that are neither tensors nor None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    baked: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: object) -> Arguments:
        """Take apart ``example_inputs``: a tuple or list (args), a mapping (kwargs) or a tensor.

        Raises:
            ExportError: It is something else or holds no tensor.
        """
        found: list[tuple[str, Tensor]] = []
        baked: dict[str, str] = {}
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            kwargs = {
                str(key): _hollow(value, str(key), found, baked)
                for key, value in example_inputs.items()
            }
            if kwargs.get("use_cache"):
                kwargs["use_cache"] = False  # a key-value cache is nothing ONNX could return
        elif isinstance(example_inputs, (Tensor, tuple, list)):
            given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
            names = _parameter_names(model, len(given))
            pairs = zip(given, names, strict=True)
            args = tuple(_hollow(value, name, found, baked) for value, name in pairs)
        else:
            raise ExportError(
                f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of "
                f"positional arguments or a dict of keyword arguments"
            )
        if not found:
            raise ExportError("example_inputs holds no tensor: the ONNX graph would have no input")
        found_names, tensors = zip(*found, strict=True)
        return cls(args, kwargs, tuple(found_names), tuple(tensors), baked)

    def fill(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with ``tensors`` in its slots: positional and keyword arguments."""
        args = tuple(_refill(value, tensors) for value in self.args)
        return args, {key: _refill(value, tensors) for key, value in self.kwargs.items()}

    def replace(self, tensors: Sequence[Tensor]) -> Arguments:
        """The same call with other tensors."""
        return dataclasses.replace(self, tensors=tuple(tensors))


@dataclass(frozen=True)
class Extra:
    """A tensor that a flat model takes in addition to those of the call.

    Attributes:
        name: Its name in the file.
        example: A value to trace with.
        dims: What torch.export is told of each axis.
        labels: What the file says of each axis.
        named_axis: The axis whose symbol is what its label says; None if there is none.
    """

    name: str
    example: Tensor
    dims: Mapping[int, object]
    labels: tuple[int | str, ...]
    named_axis: int | None


class FlatModel(nn.Module):
    """A model that takes the tensors of a call one by one and returns a tuple of tensors.

    Args:
        model: The model. The FQN of a weight is ``PREFIX`` and its FQN in the model.
        arguments: The call.
        call: How the model is called: ``call(model, *args, **kwargs)``; by default its forward.
    """

    PREFIX = "model."

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        call: Callable[..., object] = nn.Module.__call__,
    ) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model with ``tensors`` in the slots of the example call."""
        return tuple(tensor for _, tensor in self.named(tensors))

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The outputs of the model with their names."""
        args, kwargs = self.arguments.fill(tensors)
        return named_outputs(self.run(self.call, *args, **kwargs))

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """Call the model in another way: ``call(model, *args, **kwargs)``."""
        return call(self.model, *args, **kwargs)

    def over(self, model: nn.Module) -> FlatModel:
        """The same call of another model."""
        return FlatModel(model, self.arguments, self.call).eval()

    def extras(self) -> tuple[Extra, ...]:
        """What it takes after the tensors of the call."""
        return ()


def named_outputs(value: object, name: str = "") -> list[tuple[str, Tensor]]:
    """Flatten what a model returns.

    Names are the keys of mappings and dataclasses (of a transformers ``ModelOutput``) and the
    positions of sequences; a lone tensor is called ``output``.

    Raises:
        ExportError: Something in it is neither a tensor nor None nor a container of them.
    """
    if isinstance(value, Tensor):
        return [(name or "output", value)]
    if value is None:
        return []
    items: list[tuple[str, object]]
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = zip(value._fields, value, strict=True)
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in fields]
    elif isinstance(value, (tuple, list)):
        single = len(value) == 1 and not name
        items = [
            ("output" if single else f"{name or 'output'}_{index}", item)
            for index, item in enumerate(value)
        ]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [
            (f"{name}.{field.name}" if name else field.name, getattr(value, field.name))
            for field in dataclasses.fields(value)
        ]
    else:
        where = f"output '{name}'" if name else "the output"
        raise ExportError(
            f"{where} of the model is a {type(value).__name__}, which ONNX cannot return: return "
            f"tensors, or tuples, dicts and dataclasses of them"
        )
    return [pair for key, item in items for pair in named_outputs(item, key)]


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
    if len(names) < count:
        raise ExportError(
            f"example_inputs gives {count} positional arguments, but "
            f"{type(model).__name__}.forward takes {len(names)}: {', '.join(names) or 'none'}"
        )
    return names[:count]


def _hollow(value: Any, name: str, found: list[tuple[str, Tensor]], baked: dict[str, str]) -> Any:
    if isinstance(value, Tensor):
        found.append((name, value.detach()))
        return _Slot(len(found) - 1)
    if isinstance(value, Mapping):
        return {key: _hollow(item, f"{name}.{key}", found, baked) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_hollow(item, f"{name}_{index}", found, baked) for index, item in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if value is not None:
        baked[name] = repr(value)
    return value


def _refill(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _refill(item, tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_refill(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def cast_floating(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors with every floating one in ``dtype``."""
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


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
    """The default name of a dynamic axis.

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


Sizes: TypeAlias = tuple[tuple[int, ...], ...]
"""The shapes of all inputs."""

Outputs: TypeAlias = list[tuple[str, Tensor]]
"""What a call gives, by name and in order."""


@dataclass(frozen=True)
class Case:
    """One call, with what PyTorch makes of it.

    Attributes:
        inputs: The tensors, in the order of the inputs and in the dtypes of the file.
        expected: The outputs by name, in order.
        valid: Name of an output to what of it counts, a mask that can be expanded to its shape;
            outputs that are not named count everywhere.
        note: What there is to say of the values, "" for fresh ones.
    """

    inputs: Sequence[Tensor]
    expected: Outputs
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""


class Checked(Protocol):
    """What a file is compared with: a model under the call that it is exported for."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    def named(self, tensors: Sequence[Tensor], /) -> Outputs:
        """The outputs of the call by name."""

    def run(self, call: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """``call(model, *args, **kwargs)``."""


Cases: TypeAlias = Callable[[Checked], Iterator[Case]]
"""Calls of a model. What comes out of one and goes into the next has the dtype of the file's input:
the model may compute with more digits."""
