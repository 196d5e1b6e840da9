"""Arguments, axes and outputs of a call, and the calls on which a file is compared with PyTorch."""

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
    """One call of a model, with its tensors separated from the structure around them.

    Attributes:
        args: Positional arguments with a slot in place of each tensor.
        kwargs: Keyword arguments with a slot in place of each tensor.
        names: Name of each tensor: the name of the parameter, with ``_0``, ``_1``, … inside a list and
            ``.key`` inside a mapping.
        tensors: The tensors, in the order of the slots.
        baked: Map from name to value of the arguments that are neither tensors nor None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    baked: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: object) -> Arguments:
        """Separate tensors from ``example_inputs``: a tuple or list (args), a mapping (kwargs) or a tensor.

        Raises:
            ExportError: ``example_inputs`` is something else or holds no tensor.
        """
        named_tensors: list[tuple[str, Tensor]] = []
        baked: dict[str, str] = {}
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            kwargs = {
                str(key): _without_tensors(value, str(key), named_tensors, baked)
                for key, value in example_inputs.items()
            }
            if kwargs.get("use_cache"):
                kwargs["use_cache"] = False  # ONNX cannot return a key-value cache
        elif isinstance(example_inputs, (Tensor, tuple, list)):
            positional = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
            names = _parameter_names(model, len(positional))
            pairs = zip(positional, names, strict=True)
            args = tuple(
                _without_tensors(value, name, named_tensors, baked) for value, name in pairs
            )
        else:
            raise ExportError(
                f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of "
                f"positional arguments or a dict of keyword arguments"
            )
        if not named_tensors:
            raise ExportError("example_inputs holds no tensor: the ONNX graph would have no input")
        tensor_names, tensors = zip(*named_tensors, strict=True)
        return cls(args, kwargs, tuple(tensor_names), tuple(tensors), baked)

    def fill(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with ``tensors`` in the slots."""
        args = tuple(_with_tensors(value, tensors) for value in self.args)
        return args, {key: _with_tensors(value, tensors) for key, value in self.kwargs.items()}

    def replace(self, tensors: Sequence[Tensor]) -> Arguments:
        """Return the same call with other tensors."""
        return dataclasses.replace(self, tensors=tuple(tensors))


@dataclass(frozen=True)
class Extra:
    """A tensor that a flat model takes in addition to the tensors of the call.

    Attributes:
        name: Name in the file.
        example: A value to trace with.
        dims: The dimension of each axis for torch.export.
        labels: The size or name of each axis in the file.
        named_axis: The axis whose symbol gets the name in its label, or None.
    """

    name: str
    example: Tensor
    dims: Mapping[int, object]
    labels: tuple[int | str, ...]
    named_axis: int | None


class FlatModel(nn.Module):
    """A model that takes the tensors of a call one by one and returns a tuple of tensors.

    Args:
        model: The model. A weight has the FQN that it has in the model, with ``PREFIX`` in front.
        arguments: The call.
        call: Function that calls the model, ``call(model, *args, **kwargs)``; by default its forward.
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
        """Return the outputs of the model with their names."""
        args, kwargs = self.arguments.fill(tensors)
        return named_outputs(self.run(self.call, *args, **kwargs))

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """Return ``call(model, *args, **kwargs)`` for the model inside."""
        return call(self.model, *args, **kwargs)

    def over(self, model: nn.Module) -> FlatModel:
        """Return a :class:`FlatModel` of the same call around another model."""
        return FlatModel(model, self.arguments, self.call).eval()

    def extras(self) -> tuple[Extra, ...]:
        """Return the extra tensors that the model takes after the tensors of the call."""
        return ()


def named_outputs(value: object, name: str = "") -> list[tuple[str, Tensor]]:
    """Flatten the return value of a model to tensors with names.

    Names are the keys of mappings and dataclasses (such as a transformers ``ModelOutput``) and the
    positions in sequences. A single tensor is called ``output``.

    Raises:
        ExportError: The value contains an object that is neither a tensor nor None nor a container of them.
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


def _without_tensors(
    value: Any, name: str, named_tensors: list[tuple[str, Tensor]], baked: dict[str, str]
) -> Any:
    if isinstance(value, Tensor):
        named_tensors.append((name, value.detach()))
        return _Slot(len(named_tensors) - 1)
    if isinstance(value, Mapping):
        return {
            key: _without_tensors(item, f"{name}.{key}", named_tensors, baked)
            for key, item in value.items()
        }
    if isinstance(value, (tuple, list)):
        items = [
            _without_tensors(item, f"{name}_{index}", named_tensors, baked)
            for index, item in enumerate(value)
        ]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if value is not None:
        baked[name] = repr(value)
    return value


def _with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_with_tensors(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def cast_floating(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast the floating-point tensors to ``dtype``, and return all tensors."""
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


@dataclass(frozen=True)
class Axis:
    """One axis of one input.

    Attributes:
        size: Size in the example.
        name: Name in the file if the axis is dynamic, otherwise None.
        symbol: Symbol of torch.export if the axis is dynamic. Equal symbols are equal sizes.
        high: Largest size that the model takes, None if there is no limit.
        reason: Reason why the axis is fixed, "" if it is not.
    """

    size: int
    name: str | None = None
    symbol: str | None = None
    high: int | None = None
    reason: str = ""

    @property
    def label(self) -> int | str:
        """Label in the file: the name of a dynamic axis, or the size of a fixed axis."""
        return self.size if self.name is None else self.name


def given_names(dynamic_shapes: object, arguments: Arguments) -> list[Mapping[int, str]]:
    """Return the axis names that the caller gave: a map from axis to name for each input.

    Args:
        dynamic_shapes: The argument of ``export_onnx``; None for no names.
        arguments: The call.

    Raises:
        ExportError: ``dynamic_shapes`` names inputs or axes that do not exist.
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
        specs = [dynamic_shapes.get(name) for name in names]
    elif isinstance(dynamic_shapes, (tuple, list)) and len(dynamic_shapes) == len(names):
        specs = list(dynamic_shapes)
    else:
        raise ExportError(
            f"dynamic_shapes has to be a dict by input name or a sequence of {len(names)} dicts, "
            f"one for each of {', '.join(names)}"
        )
    pairs = zip(specs, names, arguments.tensors, strict=True)
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
        chosen_name = label if isinstance(label, str) else getattr(label, "__name__", "")
        labels[axis] = chosen_name or axis_name(name, axis, tensor)
    return labels


def axis_name(name: str, axis: int, tensor: Tensor) -> str:
    """Return the default name of a dynamic axis.

    Args:
        name: Name of the input.
        axis: Position of the axis.
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
"""Shapes of all inputs."""

Outputs: TypeAlias = list[tuple[str, Tensor]]
"""Outputs of a call with their names, in order."""


@dataclass(frozen=True)
class Case:
    """One call with the outputs of PyTorch, with which a file is compared.

    Attributes:
        inputs: The tensors, in the order of the inputs and in the dtypes of the file.
        expected: The outputs of PyTorch by name, in order.
        valid: Map from the name of an output to a mask of the elements to compare. A mask can be expanded
            to the shape of the output. Outputs without a mask are compared everywhere.
        note: Remark on the values, "" for new random values.
    """

    inputs: Sequence[Tensor]
    expected: Outputs
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""


class Checked(Protocol):
    """Protocol of the reference that a file is compared with: a model, and the call that is exported."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    def named(self, tensors: Sequence[Tensor], /) -> Outputs:
        """Return the outputs of the call by name."""

    def run(self, call: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``call(model, *args, **kwargs)``."""


Cases: TypeAlias = Callable[[Checked], Iterator[Case]]
"""Function that yields the calls on which a file is compared with a model.

An output that is fed to the next call is cast to the dtype of the file's input, because the model may compute
in higher precision.
"""
