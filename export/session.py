"""Running an exported file on the device that was asked for, or not at all.

ONNX Runtime answers a request for CUDA that it cannot meet with a session on the CPU and a line on
stderr. Here such a session is never handed out: what is missing is found out and raised.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import ExportError, ProviderError
from lora_fx.export.providers import PROVIDERS, check_provider, import_onnxruntime, wheel_conflict

__all__ = ["OnnxSession", "Port"]

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


class OnnxSession:
    """An exported model, loaded and ready to run.

    Args:
        path: The ``.onnx`` file; its external data has to lie beside it.
        provider: "cuda" or "cpu". What runs is this provider or nothing.
        provider_options: Options of ONNX Runtime's provider. On CUDA, TF32 is off unless they
            say otherwise: PyTorch's own matrix products do not use it by default either.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Literal["cuda", "cpu"] = "cuda",
        *,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._runtime = import_onnxruntime()
        check_provider(self._runtime, provider)
        if not self.path.is_file():
            raise ExportError(f"there is no file {self.path}: export a model to it first")
        self._session = self._load(provider, dict(provider_options or {}))
        self.provider: Literal["cuda", "cpu"] = provider
        self.inputs = tuple(_port(value) for value in self._session.get_inputs())
        self.outputs = tuple(_port(value) for value in self._session.get_outputs())

    def __repr__(self) -> str:
        return f"OnnxSession({str(self.path)!r}, provider={self.provider!r})"

    def run(
        self, inputs: Mapping[str, Any] | Sequence[Any] | Tensor | np.ndarray[Any, Any]
    ) -> dict[str, Any]:
        """Run the model once.

        Args:
            inputs: Arrays or tensors by name, or in the order of ``self.inputs``.

        Returns:
            Outputs by name: tensors, on the device of the first one given, if any of the inputs is
            a tensor, else numpy arrays.

        Raises:
            ExportError: Names, dtypes, ranks or fixed sizes do not fit, or the model fails.
        """
        given = self._by_name(inputs)
        feeds = {port.name: self._feed(port, given[port.name]) for port in self.inputs}
        try:
            results = self._session.run_with_ort_values(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
            raise ExportError(f"ONNX Runtime failed on {shapes}: {_reason(error)}") from error
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else None
        pairs = zip(self.outputs, results, strict=True)
        return {port.name: _unwrap(result, device) for port, result in pairs}

    def _load(self, provider: str, options: dict[str, str]) -> Any:
        name = PROVIDERS[provider]
        settings = self._runtime.SessionOptions()
        settings.log_severity_level = 3
        if provider == "cuda":
            options = {"use_tf32": "0", **options}
        # Shape arithmetic of a CUDA graph runs on the CPU by design, hence the second provider.
        wanted = [(name, options)] if provider == "cpu" else [(name, options), PROVIDERS["cpu"]]
        try:
            # enable_fallback=0: else ONNX Runtime retries on the CPU by itself.
            session = self._runtime.InferenceSession(
                str(self.path), settings, providers=wanted, enable_fallback=0
            )
        except Exception as error:
            reason = _reason(error)
            if type(error).__name__ in ("NotImplemented", "EPFail"):
                raise ProviderError(
                    f"the {provider} provider cannot run {self.path}: {reason}"
                ) from error
            raise ExportError(
                f"{self.path} cannot be loaded: {reason}. Is it a whole ONNX file, with its "
                f"external data beside it? Export it again if not"
            ) from error
        actual = session.get_providers()[0]
        if actual != name:
            raise ProviderError(
                f"asked for {provider}, ONNX Runtime gave {actual}: the CUDA provider did not "
                f"start on this machine. {wheel_conflict() or 'Run `lora-fx doctor`'}"
            )
        session.disable_fallback()
        return session

    def _by_name(self, inputs: Any) -> dict[str, Any]:
        names = [port.name for port in self.inputs]
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
                    f"{self.path.name} takes {len(names)} inputs ({', '.join(names)}), "
                    f"{len(inputs)} were given"
                )
            inputs = dict(zip(names, inputs, strict=True))
        missing = [name for name in names if name not in inputs]
        unknown = [name for name in inputs if name not in names]
        if missing or unknown:
            raise ExportError(_names_message(self.path.name, names, missing, unknown))
        return {name: inputs[name] for name in names}

    def _feed(self, port: Port, value: Any) -> Any:
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
        values = self._runtime.OrtValue
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            if value.dtype == torch.bfloat16:
                raw = value.view(torch.uint16).numpy()
                return values.ortvalue_from_numpy_with_onnx_type(raw, _BF16)
            value = value.numpy()
        elif dtype == "bfloat16":
            return values.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), _BF16)
        return values.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(shape))


def _port(value: Any) -> Port:
    dtype = str(_DTYPES[value.type][1]).removeprefix("torch.") if value.type in _DTYPES else ""
    return Port(value.name, dtype or value.type, tuple(value.shape))


def _unwrap(result: Any, device: torch.device | None) -> Any:
    if result.element_type() != _BF16:
        array = result.numpy()
        return array if device is None else torch.from_numpy(array).to(device)
    tensor = torch.utils.dlpack.from_dlpack(result._get_c_value()).cpu()
    if device is not None:
        return tensor.to(device)
    import ml_dtypes

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _names_message(file: str, names: list[str], missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {', '.join(missing)}")
    for name in unknown:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has '{name}', which is no input{hint}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"


def _reason(error: Exception) -> str:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing …"
    text = str(error).strip().splitlines()
    return text[0].split(" : ", 3)[-1] if text else type(error).__name__
