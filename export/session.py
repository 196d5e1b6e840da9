"""Running an exported file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.loading import load, reason_of
from lora_fx.export.ports import Port, feed, port_of, unwrap
from lora_fx.export.providers import import_onnxruntime

__all__ = ["OnnxSession", "Port"]


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
        low_memory: bool = False,
    ) -> None:
        self.path = Path(path)
        self._runtime = import_onnxruntime()
        self._session = load(
            self._runtime, self.path, provider, provider_options or {}, packed=not low_memory
        )
        self.provider: Literal["cuda", "cpu"] = provider
        self.inputs = tuple(port_of(value) for value in self._session.get_inputs())
        self.outputs = tuple(port_of(value) for value in self._session.get_outputs())

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
        feeds = {port.name: feed(self._runtime, port, given[port.name]) for port in self.inputs}
        results = self._execute(feeds)
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else None
        pairs = zip(self.outputs, results, strict=True)
        return {port.name: unwrap(result, device) for port, result in pairs}

    def _execute(self, feeds: Mapping[str, Any]) -> list[Any]:
        """From values of ONNX Runtime, by name, to values in the order of the outputs."""
        try:
            results: list[Any] = self._session.run_with_ort_values(None, dict(feeds))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape()}" for name, value in feeds.items())
            raise ExportError(f"ONNX Runtime failed on {shapes}: {reason_of(error)}") from error
        return results

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


def _names_message(file: str, names: list[str], missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {', '.join(missing)}")
    for name in unknown:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        parts.append(f"has '{name}', which is no input{hint}")
    return f"the call of {file} {' and '.join(parts)}: its inputs are {', '.join(names)}"
