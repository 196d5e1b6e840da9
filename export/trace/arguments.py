"""The arguments and results of a model as flat lists of named tensors, and back.

An ONNX graph knows tensors only. Everything else in a call (None, numbers, strings) is a constant
of the exported graph, so the flattening keeps it in a template and names it in the report.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError

__all__ = ["Arguments", "Extra", "FlatModel", "cast_floating", "named_outputs"]


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
    """A tensor that a flat model takes beside those of the call.

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
