"""Calls in which an axis has size 0: one of the inputs, or one inside the model (``x[:, 2:]`` of two tokens).

ONNX Runtime promises nothing for them: Einsum, LSTM and GRU end the process, Reshape divides by zero, a
product over nothing is whatever was in memory, a mean of nothing is a number. So it is never asked. Where
every output is empty, too, there is nothing to compute: its shape follows from the shapes in the file.
Everything else is refused.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lora_fx.errors import ExportError, hint
from lora_fx.export.ort.ports import Port

if TYPE_CHECKING:
    import onnx_ir as ir


__all__ = [
    "AXIS_LIMITS_KEY",
    "INNER_SIZES_KEY",
    "MAY_BE_EMPTY",
    "EmptyAxisError",
    "check_axes",
    "empty_outputs",
    "inner_sizes",
    "inputs_by_name",
    "size_of",
]


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
        near = hint(name, names, " (did you mean '{}'?)", count=1)
        parts.append(f"has '{name}', which is no input{near}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"


INNER_SIZES_KEY = "lora_fx.inner_sizes"
"""In the metadata: JSON of the expressions that have to be positive, see :func:`inner_sizes`."""

MAY_BE_EMPTY = "past_length"
"""The one axis that is compared with PyTorch at size 0, in the files of decoders: a prefill has no past."""


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent not in range(9):  # a file may ask for a number that no memory holds
        raise ValueError(f"no size is a power of {exponent}")
    return base ** int(exponent)


_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Fraction | int]] = {
    "floor": math.floor,
    "ceiling": math.ceil,
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b,
    "FloorDiv": lambda a, b: a // b,
}


# What each operator does to every element, or to none: nothing goes wrong where there is none.
_SAFE = frozenset([
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Cos", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "Relu", "Round", "Shape",
    "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tanh", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
])  # fmt: skip


class EmptyAxisError(ExportError):
    """A call in which an axis has size 0, although the outputs have elements."""


def inner_sizes(model: ir.Model) -> list[str]:
    """Sizes inside a file that are 0 for some calls, where ONNX Runtime does not bear that.

    Args:
        model: Its axes have their names.

    Returns:
        Expressions of the names of axes, as "sequence - 2". The axes themselves are not among them.
    """
    found: dict[str, None] = {}
    for node in model.graph.all_nodes():
        if node.op_type in _SAFE:
            continue
        for place, value in enumerate(node.inputs):
            if value is None or value.shape is None:
                continue
            axes = list(value.shape)
            if node.op_type == "MatMul":  # what it sums over is all that it does not bear
                axes = axes[-1:] if place == 0 else []
            texts = [axis.value for axis in axes if not isinstance(axis, int)]
            found.update(dict.fromkeys(text for text in texts if text and not _positive(text)))
    return list(found)


def _positive(text: str) -> bool:
    """Whether an expression is positive wherever its axes are: one without a difference or a quotient."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval").body))
    except SyntaxError:
        return True  # a name that a user gave, or nothing that could be computed
    plain = (ast.Name, ast.Load, ast.BinOp, ast.Add, ast.Mult, ast.Pow, ast.Constant)
    return all(isinstance(node, plain) for node in nodes)


def empty_outputs(
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    shapes: Mapping[str, Sequence[int]],
    file: str,
    *,
    inner: Sequence[str] = (),
    task: bool = False,
) -> list[tuple[int, ...]] | None:
    """What a call with an axis of size 0 gives, without running it.

    Args:
        inputs: The inputs of the file.
        outputs: Its outputs.
        shapes: Those of the values that were given, by the name of the input.
        file: Its name, for messages.
        inner: :func:`inner_sizes` of the file.
        task: Whether it is a decoder with its cache.

    Returns:
        The shapes of the outputs, none of which has an element; None if the call is an ordinary one.

    Raises:
        EmptyAxisError: An output would have elements, or its shape does not follow from those of the inputs.
    """
    sizes: dict[str, int] = {}
    empty = ""
    for port in inputs:
        for axis, (label, size) in enumerate(zip(port.shape, shapes[port.name], strict=True)):
            if isinstance(label, str):
                sizes[label] = size
            # A fixed axis of size 0 has it in the example, with which the file was compared.
            fine = label == 0 or (task and label == MAY_BE_EMPTY)
            if size == 0 and not fine:
                empty = empty or f"axis {axis} of '{port.name}' has size 0"
    for text in inner:
        inside = size_of(text, sizes)
        if inside is not None and inside <= 0:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            empty = empty or f"an axis inside the model has size {inside} ({text}) on {given}"
    if not empty:
        return None
    found = []
    for port in outputs:
        shape = [size_of(axis, sizes) for axis in port.shape]
        known = [size for size in shape if size is not None]
        if len(known) < len(shape) or 0 not in known or min(known) < 0:
            raise EmptyAxisError(
                f"{empty}, and output {port} of {file} has elements all the same, or may have: ONNX Runtime "
                "gives arbitrary values for sums over nothing, or ends the process. Give more"
            )
        found.append(tuple(known))
    return found


def size_of(axis: int | str | None, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis of an output.

    Args:
        axis: A size, the name of an axis, or an expression of such names: "2*sequence + 1".
        sizes: The sizes of the named axes of the inputs.

    Returns:
        Its size; None if it does not follow.
    """
    if not isinstance(axis, str):
        return axis
    if axis in sizes:
        return sizes[axis]
    if not all(name.isidentifier() for name in sizes):  # a name may look like an expression
        return None
    try:
        value = _value(ast.parse(axis, mode="eval").body, sizes)
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return int(value) if value.denominator == 1 else None


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    """Computes an expression.

    Raises:
        ValueError: It has something else than sizes and arithmetic.
        KeyError: It names an axis that is not known.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return Fraction(sizes[node.id])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, sizes)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        return Fraction(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return Fraction(_FUNCTIONS[node.func.id](*(_value(one, sizes) for one in node.args)))
    raise ValueError(ast.dump(node))
