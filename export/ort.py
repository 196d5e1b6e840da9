"""Values of ONNX Runtime and runs over them: inputs and outputs, bindings, axes, and empty axes."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError, hint
from lora_fx.export.providers import reason_of
from lora_fx.extras import load_optional

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "AXES_KEY",
    "AXIS_LIMITS_KEY",
    "BF16",
    "CPU",
    "INNER_SIZES_KEY",
    "Bound",
    "EmptyAxisError",
    "Place",
    "Port",
    "allocate",
    "bound_run",
    "check_axes",
    "check_shape",
    "element_named",
    "element_of",
    "empty_outputs",
    "empty_value",
    "feed",
    "inner_sizes",
    "inputs_by_name",
    "on_host",
    "placed",
    "port_of",
    "run_errors",
    "settle",
    "size_of",
    "to_runtime",
    "to_tensor",
    "unwrap",
    "with_empty_caches",
    "write",
]


# Running a session with values that stay where they are: a binding for each adapter and run at a time.
#
# ONNX Runtime ignores an adapter that is active in its run options here, without a word. Adapters are
# bound by the names of their inputs instead, like every other value.

BF16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no type for
_SAME_NAMES = ("float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in _SAME_NAMES},
}
CPU = torch.device("cpu", 0)


@dataclass(frozen=True)
class Place:
    """Memory that ONNX Runtime knows and PyTorch does not; what has both is a ``torch.device``.

    Attributes:
        type: ONNX Runtime's name of the kind of device: "webgpu".
        index: Which of them.
    """

    type: str
    index: int


@dataclass(frozen=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: Its name.
        dtype: torch's name of its dtype ("float32").
        shape: Its axes: a size for a fixed one, a name (or None) for a dynamic one.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(axis) for axis in self.shape)}]"


AXES_KEY = "lora_fx.axes"
"""In the metadata: JSON of the names of axes in a file for a runtime, and what lora_fx calls them."""


def port_of(value: Any, axes: Mapping[str, str] | None = None) -> Port:
    """From what ONNX Runtime says of an input or output, the axes called as :data:`AXES_KEY` says."""
    own = axes or {}
    shape = tuple(own.get(axis, axis) if isinstance(axis, str) else axis for axis in value.shape)
    return Port(value.name, _DTYPES.get(value.type, value.type), shape)


def feed(runtime: Any, port: Port, value: Any, device: torch.device = CPU) -> Any:
    """A value for an input, as ONNX Runtime takes it. What lies where the session runs is not copied.

    Args:
        runtime: The onnxruntime module.
        port: The input.
        value: An array or tensor. It has to stay as it is until the run is over.
        device: Where the session runs.

    Raises:
        ExportError: It is something else, or its dtype, rank or a fixed size does not fit.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        raise ExportError(
            f"input '{port.name}' is a {type(value).__name__}: give a numpy array or a tensor"
        )
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
        kind = "has no values (meta)" if value.is_meta else f"is {value.layout}"
        raise ExportError(f"input '{port.name}' {kind}: give a dense tensor on a device")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != port.dtype:
        raise ExportError(
            f"input '{port.name}' is {dtype}, the file takes {port.dtype}: convert it first"
        )
    shape = tuple(value.shape)
    check_shape(port, shape)
    if isinstance(value, Tensor):
        here = value.device.type != "cpu" and device.type == value.device.type
        return to_runtime(runtime, value.to(device) if here else value.cpu())
    values = runtime.OrtValue
    if dtype == "bfloat16":
        raw = np.ascontiguousarray(value).view(np.uint16)
        return values.ortvalue_from_numpy_with_onnx_type(raw, BF16)
    return values.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(shape))


def check_shape(port: Port, shape: Sequence[int]) -> None:
    """Refuse a shape that an input does not take.

    Raises:
        ExportError: The rank is another one, or a fixed size.
    """
    fits = len(shape) == len(port.shape) and all(
        not isinstance(axis, int) or axis == size
        for axis, size in zip(port.shape, shape, strict=True)
    )
    if not fits:
        raise ExportError(f"input '{port.name}' has shape {list(shape)}, the file takes {port}")


def unwrap(result: Any, device: torch.device | None) -> Any:
    """A value of ONNX Runtime as a tensor on ``device``, or as an array where that is None.

    It is copied only where it lies on another device.
    """
    if result.data_type() not in _DTYPES:
        return result.numpy()  # strings: there are no tensors of them
    tensor = to_tensor(result)
    if device is not None:
        return tensor.to(device)
    tensor = tensor.cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    ml_dtypes = load_optional(
        "ml_dtypes", "an output in bf16 as an array", "lora-fx[onnx]", error=ExportError
    )
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def to_runtime(runtime: Any, tensor: Tensor) -> Any:
    """A tensor as a value of ONNX Runtime, over the same memory where it is contiguous."""
    tensor = tensor.detach().contiguous()
    values = runtime.OrtValue
    if tensor.device.type != "cpu":
        return values.from_dlpack(_Bytes(tensor) if tensor.dtype == torch.bool else tensor)
    if tensor.dtype == torch.bfloat16:
        return values.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), BF16)
    return values.ortvalue_from_numpy(tensor.numpy())


def empty_value(runtime: Any, port: Port, shape: Sequence[int], device: torch.device) -> Any:
    """A value of ONNX Runtime without an element, for an output."""
    return allocate(runtime, shape, element_named(port.dtype), device)


def element_named(dtype: str) -> Any:
    """A dtype by torch's name of it, as ONNX Runtime takes it."""
    if dtype == "bfloat16":
        return BF16
    return getattr(np, "bool_" if dtype == "bool" else dtype)


def allocate(runtime: Any, shape: Sequence[int], element: Any, device: torch.device) -> Any:
    """A value of ONNX Runtime with memory of its own, not yet written."""
    return runtime.OrtValue.ortvalue_from_shape_and_type(
        list(shape), element, device.type, device.index
    )


def to_tensor(value: Any) -> Tensor:
    """A value of ONNX Runtime as a tensor over the same memory.

    Memory of ONNX Runtime's own lives as long as the tensor. What was made of an array or a tensor of
    the CPU (:func:`to_runtime`) does not own its memory: keep the value itself for as long.
    """
    tensor: Tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    # ONNX Runtime hands bool over as bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


def on_host(value: Any) -> Tensor:
    """A value of ONNX Runtime as a tensor on the CPU; over the same memory where it lies there."""
    if value.device_name().lower() == "cpu" or torch.cuda.is_available():
        return to_tensor(value).cpu()
    return torch.from_numpy(value.numpy())


class _Bytes:
    """A tensor of bool as ONNX Runtime takes it through DLPack: bytes that are said to be bool."""

    dtype = torch.bool

    def __init__(self, tensor: Tensor) -> None:
        self._bytes = tensor.view(torch.uint8)

    def __dlpack__(self) -> Any:
        return self._bytes.__dlpack__()


@dataclass(frozen=True, eq=False)
class Bound:
    """Inputs that many runs of one session have, and bindings that have them.

    Attributes:
        values: By name.
        spare: Bindings that no run uses. Runs at the same time have one each.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    spare: list[Any] = field(default_factory=list)

    def binding(self, session: Any) -> Any:
        """A binding with these inputs, and whatever else a run before this one has bound."""
        try:
            return self.spare.pop()
        except IndexError:
            return self.fresh(session)

    def fresh(self, session: Any) -> Any:
        """A binding with these inputs and nothing else."""
        binding = session.io_binding()
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
        return binding


def bound_run(
    session: Any,
    feeds: Mapping[str, Any],
    bound: Bound,
    outputs: Sequence[Port],
    device: torch.device = CPU,
    *,
    take: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Run once. Nothing is shared with other runs at the same time but the values, which are only read.

    Args:
        session: Of ONNX Runtime.
        feeds: Values for the inputs of the model, by name.
        bound: Values for other inputs, of an adapter; those that are not there are the file's defaults.
        outputs: The outputs of the file.
        device: Where the results are to lie.
        take: Makes of a value what does not need it any more. The binding then serves further runs.

    Returns:
        In the order of the outputs what ``take`` made; without it the values.

    Raises:
        ExportError: ONNX Runtime fails, with the shapes that it failed on.
    """
    with run_errors(lambda: feeds):
        binding = bound.fresh(session) if take is None else bound.binding(session)
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        # Each time: what is bound is written to, and the results of the run before may be in use.
        for port in outputs:
            binding.bind_output(port.name, device.type, device.index)
        session.run_with_iobinding(binding)
        if take is None:
            results: list[Any] = binding.get_outputs()
            # The results keep the binding alive, and it the inputs: a cache would be held twice.
            binding.clear_binding_inputs()
            return results
        # The values are the binding's own. It must keep neither their memory nor that of the inputs.
        taken = [take(value) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value.ortvalue_from_numpy(_NOTHING))
        bound.spare.append(binding)
        return taken


_NOTHING = np.zeros(1, np.float32)
"""What a binding has for an input between two runs."""


@contextmanager
def run_errors(feeds: Callable[[], Mapping[str, Any]], where: str = "") -> Iterator[None]:
    """Turns an error of ONNX Runtime into an ``ExportError`` that names the shapes of the run.

    Args:
        feeds: Gives values of ONNX Runtime, or shapes, by the names of the inputs.
        where: Stands after the shapes.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {_shape(value)}" for name, value in feeds().items())
        raise ExportError(f"ONNX Runtime failed on {shapes}{where}: {reason_of(error)}") from error


def _shape(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else list(value.shape())


def placed(runtime: Any, tensor: Tensor, device: torch.device) -> Any:
    """A value of ONNX Runtime on a device, copied there once."""
    if device.type == "cpu":
        return to_runtime(runtime, tensor)
    if torch.cuda.is_available():
        copy = tensor.to(device)
        settle([copy])
        return to_runtime(runtime, copy)
    buffer = allocate(runtime, tensor.shape, element_of(tensor), device)
    write(buffer, tensor)
    return buffer


def element_of(tensor: Tensor) -> Any:
    """The dtype of a tensor on the CPU, as ONNX Runtime takes it."""
    return BF16 if tensor.dtype == torch.bfloat16 else tensor.contiguous().numpy().dtype


def write(buffer: Any, value: Tensor) -> None:
    """Copies a tensor into a value of ONNX Runtime of its shape and dtype."""
    if not value.numel():
        return
    if value.is_cuda:
        to_tensor(buffer).copy_(value)
        settle([value])
        return
    value = value.contiguous()
    # The bytes are copied as they are, and numpy has no bf16.
    raw = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    buffer.update_inplace(raw.numpy())


def settle(values: Sequence[Any], device: torch.device = CPU) -> None:
    """Wait for what PyTorch still computes on a GPU: ONNX Runtime has streams of its own.

    Args:
        values: What it may still write.
        device: Where the session runs. Results that were handed out and let go of may still be read
            there, and the next run takes their memory.
    """
    if not values and device.type == "cpu":
        return
    devices = {value.device for value in values if isinstance(value, Tensor) and value.is_cuda}
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(device)
    for one in devices:
        torch.cuda.current_stream(one).synchronize()


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


def with_empty_caches(inputs: Any, ports: Sequence[Port]) -> Any:
    """Adds what a text begins with to the inputs of a decoder: empty caches, a mask that covers all tokens.

    Args:
        inputs: As the caller gave them. Caches are added where they are named and none is among them.
        ports: The inputs of the file.
    """
    caches = [port for port in ports if _MAY_BE_EMPTY in port.shape]
    if not isinstance(inputs, Mapping) or any(port.name in inputs for port in caches):
        return inputs
    given = {port.name: inputs[port.name] for port in ports if port.name in inputs}
    sizes: dict[int | str | None, int] = {
        axis: size
        for port in ports
        for axis, size in zip(port.shape, getattr(given.get(port.name), "shape", ()), strict=False)
    }
    sizes |= {_MAY_BE_EMPTY: 0}
    sizes.setdefault(_TOTAL, sizes.get(_NEW, 0))
    device = next((one.device for one in given.values() if isinstance(one, Tensor)), None)
    added = {}
    for port in ports:
        shape = [one if isinstance(one, int) else sizes.get(one, -1) for one in port.shape]
        wanted = port in caches or _TOTAL in port.shape
        if port.name in given or not wanted or min(shape) < 0:
            continue
        made = torch.ones(shape, dtype=getattr(torch, port.dtype), device=device)
        plain = device is None and made.dtype is not torch.bfloat16
        added[port.name] = made.numpy() if plain else made
    return {**inputs, **added}


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
    if task and _TOTAL in seen:
        (total, where), past, new = (
            seen[_TOTAL],
            seen[_MAY_BE_EMPTY][0],
            seen[_NEW][0],
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


# Calls in which an axis has size 0: one of the inputs, or one inside the model (``x[:, 2:]`` of two tokens).
#
# ONNX Runtime promises nothing for them: Einsum, LSTM and GRU end the process, Reshape divides by zero, a
# product over nothing is whatever was in memory, a mean of nothing is a number. So it is never asked. Where
# every output is empty, too, there is nothing to compute: its shape follows from the shapes in the file.
# Everything else is refused.

INNER_SIZES_KEY = "lora_fx.inner_sizes"
"""In the metadata: JSON of the expressions that have to be positive, see :func:`inner_sizes`."""

_MAY_BE_EMPTY = "past_length"
"""The one axis that is compared with PyTorch at size 0, in the files of decoders: a prefill has no past."""

_NEW, _TOTAL = "sequence", "total_length"
"""The axis of what a decoder reads now, and that of its past and this together."""


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
            fine = label == 0 or (task and label == _MAY_BE_EMPTY)
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
