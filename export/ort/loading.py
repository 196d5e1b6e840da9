"""Loading a file on the provider that was asked for, or not at all.

ONNX Runtime answers a request for CUDA that it cannot meet with a session on the CPU and a line on
stderr. Here such a session is never handed out: what is missing is found out and raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.errors import ExportError, ProviderError
from lora_fx.export.ort.providers import PROVIDERS, check_provider, wheel_conflict

__all__ = ["load", "reason_of"]


def load(
    runtime: Any,
    path: Path,
    provider: str,
    options: Mapping[str, str],
    settings: Any,
) -> Any:
    """A session of ONNX Runtime.

    Args:
        runtime: The onnxruntime module.
        path: The ``.onnx`` file.
        provider: "cuda" or "cpu".
        options: Of the provider.
        settings: ``SessionOptions``, see ``session_settings``.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
    """
    check_provider(runtime, provider)
    if path.is_dir():
        inside = ", ".join(sorted(one.name for one in path.glob("*.onnx"))) or "no .onnx file"
        raise ExportError(f"{path} is a folder, which holds {inside}: give the file")
    if not path.is_file():
        raise ExportError(f"there is no file {path}: export a model to it first")
    name = PROVIDERS[provider]
    # Shape arithmetic of a CUDA graph runs on the CPU by design, hence the second provider.
    wanted = [(name, options)] if provider == "cpu" else [(name, options), PROVIDERS["cpu"]]
    try:
        # enable_fallback=0: else ONNX Runtime retries on the CPU by itself.
        session = runtime.InferenceSession(str(path), settings, providers=wanted, enable_fallback=0)
    except Exception as error:
        reason = reason_of(error)
        kind = type(error).__name__
        if options.get("enable_cuda_graph") == "1" and kind in ("Fail", "NotImplemented", "EPFail"):
            raise ProviderError(
                f"{path} cannot be captured as a CUDA graph: {reason}. That takes a model without control "
                f"flow, all of it on the GPU: load it without cuda_graph"
            ) from error
        if kind in ("NotImplemented", "EPFail"):
            bf16 = (
                "bf16 needs provider='cuda'; for the CPU, export with dtype='fp32' or 'fp16'"
                if provider == "cpu" and _has_bf16(path)
                else ""
            )
            raise ProviderError(
                f"the {provider} provider cannot run {path}: {bf16 or reason}"
            ) from error
        raise ExportError(
            f"{path} cannot be loaded: {reason}. Is it a whole ONNX file, with its "
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


def _has_bf16(path: Path) -> bool:
    """Whether a file has weights in bf16; False also where the onnx package is not there to look."""
    try:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # noqa: BLE001  # the reason of ONNX Runtime is there without this
        return False
    return any(one.data_type == onnx.TensorProto.BFLOAT16 for one in graph.initializer)


def reason_of(error: Exception) -> str:
    """What an error of ONNX Runtime says, without its codes."""
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing …"
    text = str(error).strip().splitlines()
    return text[0].split(" : ", 3)[-1] if text else type(error).__name__
