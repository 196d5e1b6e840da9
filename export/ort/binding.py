"""Running a session with values that stay where they are: one binding for each run.

ONNX Runtime ignores an adapter that is active in its run options here, without a word. Adapters are
bound by the names of their inputs instead, like every other value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.ort.loading import reason_of
from lora_fx.export.ort.ports import BF16, CPU, Device, Port, to_runtime

__all__ = ["bound_run", "placed", "settle"]


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
