"""Values of ONNX Runtime and runs on them: inputs and outputs, bindings, axes, and empty axes."""

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


# Runs of a session on values that are not copied. Each adapter has a binding for each concurrent run.
#
# ONNX Runtime silently ignores an adapter in the options of such a run. So adapters are bound by the names of
# their inputs, like every other value.

BF16 = 16  # onnx.TensorProto.BFLOAT16, which has no numpy type
_SAME_NAMES = ("float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in _SAME_NAMES},
}
CPU = torch.device("cpu", 0)


@dataclass(frozen=True)
class Place:
    """Device of ONNX Runtime that PyTorch does not have. Devices that both have are a ``torch.device``.

    Attributes:
        type: ONNX Runtime's name of the kind of device: "webgpu".
        index: Index of the device among all devices of this kind.
    """

    type: str
    index: int


@dataclass(frozen=True)
class Port:
    """Input or output of a file.

    Attributes:
        name: Its name.
        dtype: torch's name of its dtype ("float32").
        shape: A size for each fixed axis, a name (or None) for each dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(axis) for axis in self.shape)}]"


AXES_KEY = "lora_fx.axes"
"""Metadata key: JSON that maps names of axes in a file for a runtime to names of lora_fx."""


def port_of(value: Any, axes: Mapping[str, str] | None = None) -> Port:
    """Convert an input or output of ONNX Runtime, with axes renamed by the entry of :data:`AXES_KEY`."""
    own = axes or {}
    shape = tuple(own.get(axis, axis) if isinstance(axis, str) else axis for axis in value.shape)
    return Port(value.name, _DTYPES.get(value.type, value.type), shape)


def feed(runtime: Any, port: Port, value: Any, device: torch.device = CPU) -> Any:
    """Convert an input to a value of ONNX Runtime. A tensor on the device of the session is not copied.

    Args:
        runtime: The onnxruntime module.
        port: The input.
        value: An array or tensor. It must not change until the run is over.
        device: Device of the session.

    Raises:
        ExportError: The value has another type, or its dtype, rank or a fixed size does not fit.
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
        on_device = value.device.type != "cpu" and device.type == value.device.type
        return to_runtime(runtime, value.to(device) if on_device else value.cpu())
    values = runtime.OrtValue
    if dtype == "bfloat16":
        raw = np.ascontiguousarray(value).view(np.uint16)
        return values.ortvalue_from_numpy_with_onnx_type(raw, BF16)
    return values.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(shape))


def check_shape(port: Port, shape: Sequence[int]) -> None:
    """Raise if a shape does not fit an input.

    Raises:
        ExportError: The rank or a fixed size differs.
    """
    fits = len(shape) == len(port.shape) and all(
        not isinstance(axis, int) or axis == size
        for axis, size in zip(port.shape, shape, strict=True)
    )
    if not fits:
        raise ExportError(f"input '{port.name}' has shape {list(shape)}, the file takes {port}")


def unwrap(result: Any, device: torch.device | None) -> Any:
    """Convert a value of ONNX Runtime to a tensor on ``device``, or to an array if that is None.

    The memory is copied only if the value is on another device.
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
    """Convert a tensor to a value of ONNX Runtime. The value shares the memory of a contiguous tensor."""
    tensor = tensor.detach().contiguous()
    values = runtime.OrtValue
    if tensor.device.type != "cpu":
        return values.from_dlpack(_Bytes(tensor) if tensor.dtype == torch.bool else tensor)
    if tensor.dtype == torch.bfloat16:
        return values.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), BF16)
    return values.ortvalue_from_numpy(tensor.numpy())


def empty_value(runtime: Any, port: Port, shape: Sequence[int], device: torch.device) -> Any:
    """Return a value of ONNX Runtime without elements, for an output."""
    return allocate(runtime, shape, element_named(port.dtype), device)


def element_named(dtype: str) -> Any:
    """Return the element type of ONNX Runtime for torch's name of a dtype."""
    if dtype == "bfloat16":
        return BF16
    return getattr(np, "bool_" if dtype == "bool" else dtype)


def allocate(runtime: Any, shape: Sequence[int], element: Any, device: torch.device) -> Any:
    """Return a value of ONNX Runtime with new, uninitialized memory."""
    return runtime.OrtValue.ortvalue_from_shape_and_type(
        list(shape), element, device.type, device.index
    )


def to_tensor(value: Any) -> Tensor:
    """Convert a value of ONNX Runtime to a tensor that shares its memory.

    Memory that ONNX Runtime allocated lives as long as the tensor. A value from an array or a CPU tensor
    (:func:`to_runtime`) does not own its memory: keep the value as long as the tensor.
    """
    tensor: Tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    # ONNX Runtime exports bool as bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


def on_host(value: Any) -> Tensor:
    """Convert a value of ONNX Runtime to a tensor on the CPU. A value on the CPU shares its memory."""
    if value.device_name().lower() == "cpu" or torch.cuda.is_available():
        return to_tensor(value).cpu()
    return torch.from_numpy(value.numpy())


class _Bytes:
    """Wrapper of a bool tensor for DLPack of ONNX Runtime, which takes bytes that are declared as bool."""

    dtype = torch.bool

    def __init__(self, tensor: Tensor) -> None:
        self._bytes = tensor.view(torch.uint8)

    def __dlpack__(self) -> Any:
        return self._bytes.__dlpack__()


@dataclass(frozen=True, eq=False)
class Bound:
    """Inputs that many runs of a session share, such as factors, and bindings with these inputs.

    Attributes:
        values: The inputs by name.
        spare: Bindings that no run uses. Concurrent runs have separate bindings.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    spare: list[Any] = field(default_factory=list)

    def binding(self, session: Any) -> Any:
        """Return a binding with these inputs for one run. Other inputs may be left from an earlier run."""
        try:
            return self.spare.pop()
        except IndexError:
            return self.fresh(session)

    def fresh(self, session: Any) -> Any:
        """Return a new binding with only these inputs."""
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
    """Run a session once on ``feeds`` and ``bound``. Concurrent runs may share ``bound``, which is only read.

    Args:
        session: Session of ONNX Runtime.
        feeds: Values for the inputs of the model, by name.
        bound: Values for the inputs of an adapter; missing ones have the file's defaults.
        outputs: The outputs of the file.
        device: Device of the results.
        take: Converts a value to a result that does not need its memory. The binding is then reused.

    Returns:
        Results of ``take`` in the order of the outputs; without it the values.

    Raises:
        ExportError: ONNX Runtime fails. The message has the shapes.
    """
    with run_errors(lambda: feeds):
        binding = bound.fresh(session) if take is None else bound.binding(session)
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        # Outputs are bound for each run, because the results of the last run may still be in use.
        for port in outputs:
            binding.bind_output(port.name, device.type, device.index)
        session.run_with_iobinding(binding)
        if take is None:
            results: list[Any] = binding.get_outputs()
            # The results keep the binding alive. With its inputs, a cache would be in memory twice.
            binding.clear_binding_inputs()
            return results
        # The binding owns the values. It must not keep their memory or that of the inputs.
        taken = [take(value) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value.ortvalue_from_numpy(_NOTHING))
        bound.spare.append(binding)
        return taken


_NOTHING = np.zeros(1, np.float32)
"""Placeholder for the inputs of a binding between two runs."""


@contextmanager
def run_errors(feeds: Callable[[], Mapping[str, Any]], where: str = "") -> Iterator[None]:
    """Turn an error of ONNX Runtime into an ``ExportError`` that names the shapes of the run.

    Args:
        feeds: Returns values of ONNX Runtime, or shapes, by the names of the inputs.
        where: Text that follows the shapes.
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
    """Copy a tensor to a device, as a value of ONNX Runtime."""
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
    """Return the element type of ONNX Runtime for a tensor on the CPU."""
    return BF16 if tensor.dtype == torch.bfloat16 else tensor.contiguous().numpy().dtype


def write(buffer: Any, value: Tensor) -> None:
    """Copy a tensor into a value of ONNX Runtime of the same shape and dtype."""
    if not value.numel():
        return
    if value.is_cuda:
        to_tensor(buffer).copy_(value)
        settle([value])
        return
    value = value.contiguous()
    # Only bytes are copied, so uint16 can stand for bf16, which numpy lacks.
    raw = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    buffer.update_inplace(raw.numpy())


def settle(values: Sequence[Any], device: torch.device = CPU) -> None:
    """Wait for PyTorch's pending work on a GPU, because ONNX Runtime has separate streams.

    Args:
        values: Tensors that PyTorch may still write.
        device: Device of the session. PyTorch may still read freed results there, and the next run
            reuses their memory.
    """
    if not values and device.type == "cpu":
        return
    devices = {value.device for value in values if isinstance(value, Tensor) and value.is_cuda}
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(device)
    for cuda_device in devices:
        torch.cuda.current_stream(cuda_device).synchronize()


AXIS_LIMITS_KEY = "lora_fx.axis_limits"
"""Metadata key: JSON of the largest sizes of axes, for axes with a limit."""


def inputs_by_name(inputs: Any, names: Sequence[str], file: str) -> dict[str, Any]:
    """Return the inputs of a call by name.

    Args:
        inputs: Arrays or tensors by name, in the order of ``names``, or a single one.
        names: The inputs of the file.
        file: Name of the file, for messages.

    Raises:
        ExportError: An input is missing or unknown. The message has the nearest name.
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
                f"{file} takes {len(names)} inputs ({', '.join(names)}), but got {len(inputs)}"
            )
        inputs = dict(zip(names, inputs, strict=True))
    missing = [name for name in names if name not in inputs]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        raise ExportError(_message(file, names, missing, unknown))
    return {name: inputs[name] for name in names}


def with_empty_caches(inputs: Any, ports: Sequence[Port]) -> Any:
    """Add the inputs of a decoder that begins a text: empty caches, and a mask that covers all tokens.

    Args:
        inputs: Inputs of the caller. Caches are added if inputs are a mapping without any cache.
        ports: The inputs of the file.
    """
    caches = [port for port in ports if _MAY_BE_EMPTY in port.shape]
    if not isinstance(inputs, Mapping) or any(port.name in inputs for port in caches):
        return inputs
    present = {port.name: inputs[port.name] for port in ports if port.name in inputs}
    sizes: dict[int | str | None, int] = {
        axis: size
        for port in ports
        for axis, size in zip(
            port.shape, getattr(present.get(port.name), "shape", ()), strict=False
        )
    }
    sizes |= {_MAY_BE_EMPTY: 0}
    sizes.setdefault(_TOTAL, sizes.get(_NEW, 0))
    device = next((value.device for value in present.values() if isinstance(value, Tensor)), None)
    added = {}
    for port in ports:
        shape = [axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in port.shape]
        wanted = port in caches or _TOTAL in port.shape
        if port.name in present or not wanted or min(shape) < 0:
            continue
        tensor = torch.ones(shape, dtype=getattr(torch, port.dtype), device=device)
        plain = device is None and tensor.dtype is not torch.bfloat16
        added[port.name] = tensor.numpy() if plain else tensor
    return {**inputs, **added}


def check_axes(
    ports: Sequence[Port],
    inputs: Mapping[str, Any],
    limits: Mapping[str, int],
    file: str,
    *,
    task: bool = False,
) -> None:
    """Raise for sizes that the file does not take. ONNX Runtime may compute wrong values for such sizes.

    ONNX Runtime lets values share memory if their axes have the same names.

    Args:
        ports: The inputs.
        inputs: Arrays or tensors by name, of the right ranks.
        limits: The largest size of an axis, by its name.
        file: Name of the file, for messages.
        task: True for the axes of a decoder with its cache.

    Raises:
        ExportError: Axes of the same name have different sizes, or an axis is too long.
    """
    seen: dict[str, tuple[int, str]] = {}
    for port in ports:
        for index, (axis, size) in enumerate(zip(port.shape, inputs[port.name].shape, strict=True)):
            if not isinstance(axis, str):
                continue
            label = f"axis {index} of '{port.name}'"
            known, where = seen.setdefault(axis, (size, label))
            if size != known:
                raise ExportError(
                    f"{file} has one '{axis}' for {where} and {label}, and they have {known} and {size}: "
                    "give both the same size"
                )
            if size > limits.get(axis, size):
                raise ExportError(
                    f"{label} has {size}, and the model takes at most {limits[axis]} ('{axis}'): give less, "
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


# Calls in which an axis has size 0, in an input or inside the model (``x[:, 2:]`` of two tokens).
#
# ONNX Runtime guarantees nothing for them: Einsum, LSTM and GRU end the process, Reshape divides by zero, a
# product over an empty axis returns uninitialized memory, and a mean over it returns a number. So such calls
# never reach ONNX Runtime. If every output is empty, too, nothing needs to be computed, because its shape
# follows from the shapes in the file. All other such calls raise.

INNER_SIZES_KEY = "lora_fx.inner_sizes"
"""Metadata key: JSON of the expressions that have to be positive, see :func:`inner_sizes`."""

_MAY_BE_EMPTY = "past_length"
"""Name of the axis of decoders that may have size 0, because the first step of a text has no past."""

_NEW, _TOTAL = "sequence", "total_length"
"""Axes of a decoder: the new tokens, and the past and the new tokens together."""


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent not in range(9):  # a file may have a power that is too large for memory
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


# Operators that are safe on empty tensors, because they treat each element separately.
_SAFE = frozenset([
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Cos", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "Relu", "Round", "Shape",
    "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tanh", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
])  # fmt: skip


class EmptyAxisError(ExportError):
    """Error for a call in which an axis has size 0, although the outputs have elements."""


def inner_sizes(model: ir.Model) -> list[str]:
    """Return sizes inside a file that are 0 for some calls, at operators that are unsafe on empty tensors.

    Args:
        model: The model, with named axes.

    Returns:
        Expressions of the names of axes, such as "sequence - 2". Plain names are not included.
    """
    sizes: dict[str, None] = {}
    for node in model.graph.all_nodes():
        if node.op_type in _SAFE:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.shape is None:
                continue
            axes = list(value.shape)
            if node.op_type == "MatMul":  # only the axis that it sums over must not be empty
                axes = axes[-1:] if index == 0 else []
            texts = [axis.value for axis in axes if not isinstance(axis, int)]
            sizes.update(dict.fromkeys(text for text in texts if text and not _positive(text)))
    return list(sizes)


def _positive(text: str) -> bool:
    """Return True if a size cannot be 0: its expression has no difference and no quotient."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval").body))
    except SyntaxError:
        return True  # a name from the user, or something that cannot be computed
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
    """Return the output shapes of a call with an axis of size 0, without running it.

    Args:
        inputs: The inputs of the file.
        outputs: The outputs of the file.
        shapes: Shapes of the input values by name.
        file: Name of the file, for messages.
        inner: :func:`inner_sizes` of the file.
        task: True for a decoder with its cache.

    Returns:
        The shapes of the outputs, all without elements; None if no axis of the call is empty.

    Raises:
        EmptyAxisError: An output would have elements, or its shape does not follow from the input shapes.
    """
    sizes: dict[str, int] = {}
    empty = ""
    for port in inputs:
        for axis, (label, size) in enumerate(zip(port.shape, shapes[port.name], strict=True)):
            if isinstance(label, str):
                sizes[label] = size
            # A fixed axis of size 0 also had size 0 in the example, on which the file was compared.
            fine = label == 0 or (task and label == _MAY_BE_EMPTY)
            if size == 0 and not fine:
                empty = empty or f"axis {axis} of '{port.name}' has size 0"
    for text in inner:
        inside = size_of(text, sizes)
        if inside is not None and inside <= 0:
            listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            empty = empty or f"an axis inside the model has size {inside} ({text}) on {listing}"
    if not empty:
        return None
    empty_shapes = []
    for port in outputs:
        shape = [size_of(axis, sizes) for axis in port.shape]
        known = [size for size in shape if size is not None]
        if len(known) < len(shape) or 0 not in known or min(known) < 0:
            raise EmptyAxisError(
                f"{empty}, and output {port} of {file} has elements all the same, or may have: ONNX Runtime "
                "gives arbitrary values for sums over nothing, or ends the process. Give more"
            )
        empty_shapes.append(tuple(known))
    return empty_shapes


def size_of(axis: int | str | None, sizes: Mapping[str, int]) -> int | None:
    """Compute the size of an axis of an output.

    Args:
        axis: A size, the name of an axis, or an expression of such names: "2*sequence + 1".
        sizes: The sizes of the named axes of the inputs.

    Returns:
        The size; None if it does not follow from the inputs.
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
    """Evaluate the expression of a size, such as ``2*batch``, with the sizes of the named axes.

    Raises:
        ValueError: The expression has more than sizes and arithmetic.
        KeyError: The expression names an unknown axis.
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
        return Fraction(
            _FUNCTIONS[node.func.id](*(_value(argument, sizes) for argument in node.args))
        )
    raise ValueError(ast.dump(node))
