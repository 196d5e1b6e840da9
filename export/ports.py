"""The inputs and outputs of a file, and values on their way in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError

__all__ = ["Port", "feed", "port_of", "unwrap"]

_BF16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no type for
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


def feed(runtime: Any, port: Port, value: Any) -> Any:
    """A value for an input, as ONNX Runtime takes it.

    Args:
        runtime: The onnxruntime module.
        port: The input.
        value: An array or tensor.

    Raises:
        ExportError: It is something else, or its dtype, rank or a fixed size does not fit.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        raise ExportError(
            f"input '{port.name}' is a {type(value).__name__}: give a numpy array or a tensor"
        )
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
    values = runtime.OrtValue
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            raw = value.view(torch.uint16).numpy()
            return values.ortvalue_from_numpy_with_onnx_type(raw, _BF16)
        value = value.numpy()
    elif dtype == "bfloat16":
        return values.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), _BF16)
    return values.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(shape))


def unwrap(result: Any, device: torch.device | None) -> Any:
    """A value of ONNX Runtime as a tensor on ``device``, or as an array where that is None."""
    if result.element_type() != _BF16:
        array = result.numpy()
        return array if device is None else torch.from_numpy(array).to(device)
    tensor = torch.utils.dlpack.from_dlpack(result._get_c_value()).cpu()
    if device is not None:
        return tensor.to(device)
    import ml_dtypes

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
