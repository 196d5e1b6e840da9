"""Running a session with values that stay where they are: one binding for each run.

ONNX Runtime ignores an adapter that is active in its run options here, without a word. Adapters are
bound by the names of their inputs instead, like every other value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.ort.providers import reason_of

__all__ = [
    "BF16",
    "CPU",
    "Device",
    "Port",
    "bound_run",
    "empty_value",
    "feed",
    "placed",
    "port_of",
    "settle",
    "to_runtime",
    "to_tensor",
    "unwrap",
]


BF16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no type for
_DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "tensor(float)": (np.float32, torch.float32),
    "tensor(float16)": (np.float16, torch.float16),
    "tensor(double)": (np.float64, torch.float64),
    "tensor(bfloat16)": (None, torch.bfloat16),
    "tensor(int64)": (np.int64, torch.int64),
    "tensor(int32)": (np.int32, torch.int32),
    "tensor(int16)": (np.int16, torch.int16),
    "tensor(int8)": (np.int8, torch.int8),
    "tensor(uint8)": (np.uint8, torch.uint8),
    "tensor(bool)": (np.bool_, torch.bool),
}


@dataclass(frozen=True)
class Device:
    """Where a session runs.

    Attributes:
        kind: "cpu" or "cuda".
        index: Which of several.
    """

    kind: str
    index: int = 0

    @property
    def torch(self) -> torch.device:
        """What PyTorch calls it."""
        return torch.device(self.kind, self.index) if self.kind != "cpu" else torch.device("cpu")


CPU = Device("cpu")


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


def port_of(value: Any) -> Port:
    """From what ONNX Runtime says of an input or output."""
    dtype = str(_DTYPES[value.type][1]).removeprefix("torch.") if value.type in _DTYPES else ""
    return Port(value.name, dtype or value.type, tuple(value.shape))


def feed(runtime: Any, port: Port, value: Any, device: Device = CPU) -> Any:
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
    fits = len(shape) == len(port.shape) and all(
        not isinstance(axis, int) or axis == size
        for axis, size in zip(port.shape, shape, strict=True)
    )
    if not fits:
        raise ExportError(f"input '{port.name}' has shape {list(shape)}, the file takes {port}")
    if isinstance(value, Tensor):
        here = value.device.type != "cpu" and device.kind == value.device.type
        return to_runtime(runtime, value.to(device.torch) if here else value.cpu())
    values = runtime.OrtValue
    if dtype == "bfloat16":
        raw = np.ascontiguousarray(value).view(np.uint16)
        return values.ortvalue_from_numpy_with_onnx_type(raw, BF16)
    return values.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(shape))


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
    import ml_dtypes

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


def empty_value(runtime: Any, port: Port, shape: Sequence[int], device: Device) -> Any:
    """A value of ONNX Runtime without an element, for an output."""
    bf16 = port.dtype == "bfloat16"
    element = BF16 if bf16 else getattr(np, "bool_" if port.dtype == "bool" else port.dtype)
    return runtime.OrtValue.ortvalue_from_shape_and_type(
        list(shape), element, device.kind, device.index
    )


def to_tensor(value: Any) -> Tensor:
    """A value of ONNX Runtime as a tensor over the same memory.

    Memory of ONNX Runtime's own lives as long as the tensor. What was made of an array or a tensor of
    the CPU (:func:`to_runtime`) does not own its memory: keep the value itself for as long.
    """
    tensor: Tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    # ONNX Runtime hands bool over as bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


class _Bytes:
    """A tensor of bool as ONNX Runtime takes it through DLPack: bytes that are said to be bool."""

    dtype = torch.bool

    def __init__(self, tensor: Tensor) -> None:
        self._bytes = tensor.view(torch.uint8)

    def __dlpack__(self) -> Any:
        return self._bytes.__dlpack__()


def bound_run(
    session: Any,
    feeds: Mapping[str, Any],
    adapter: Mapping[str, Any],
    outputs: Sequence[Port],
    device: Device = CPU,
    host: Collection[str] = (),
) -> list[Any]:
    """Run once. Nothing is shared with other runs but the values, which are only read.

    Args:
        session: Of ONNX Runtime.
        feeds: Values for the inputs of the model, by name.
        adapter: Values for adapter inputs; those that are not there are the file's defaults.
        outputs: The outputs of the file.
        device: Where the results are to lie.
        host: Names of outputs that are to lie on the CPU all the same.

    Returns:
        Values in the order of the outputs.

    Raises:
        ExportError: ONNX Runtime fails, with the shapes that it failed on.
    """
    try:
        binding = session.io_binding()
        for name, value in (*feeds.items(), *adapter.items()):
            binding.bind_ortvalue_input(name, value)
        for port in outputs:
            place = CPU if port.name in host else device
            binding.bind_output(port.name, place.kind, place.index)
        session.run_with_iobinding(binding)
        results: list[Any] = binding.get_outputs()
        # The results keep the binding alive, and it the inputs: a cache would be held twice.
        binding.clear_binding_inputs()
    except Exception as error:
        shapes = ", ".join(f"{name} {value.shape()}" for name, value in feeds.items())
        raise ExportError(f"ONNX Runtime failed on {shapes}: {reason_of(error)}") from error
    return results


def placed(runtime: Any, tensor: Tensor, device: Device) -> Any:
    """A value of ONNX Runtime on a device, copied there once."""
    if device.kind == "cpu":
        return to_runtime(runtime, tensor)
    if torch.cuda.is_available():
        copy = tensor.to(device.torch)
        settle([copy])
        return to_runtime(runtime, copy)
    if tensor.dtype == torch.bfloat16:
        # numpy has no bf16, so that ONNX Runtime takes the bytes into a place of that type.
        place = runtime.OrtValue.ortvalue_from_shape_and_type(
            list(tensor.shape), BF16, device.kind, device.index
        )
        if tensor.numel():
            place.update_inplace(tensor.contiguous().view(torch.uint16).numpy())
        return place
    array = tensor.contiguous().numpy()
    return runtime.OrtValue.ortvalue_from_numpy(array, device.kind, device.index)


def settle(values: Sequence[Any], device: Device = CPU) -> None:
    """Wait for what PyTorch still computes on a GPU: ONNX Runtime has streams of its own.

    Args:
        values: What it may still write.
        device: Where the session runs. Results that were handed out and let go of may still be read
            there, and the next run takes their memory.
    """
    devices = {value.device for value in values if isinstance(value, Tensor) and value.is_cuda}
    if device.kind == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(device.torch)
    for one in devices:
        torch.cuda.current_stream(one).synchronize()
