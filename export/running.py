"""Running a session of ONNX Runtime on its own values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_fx.errors import ExportError
from lora_fx.export.loading import reason_of

__all__ = ["execute"]


def execute(
    session: Any,
    feeds: Mapping[str, Any],
    outputs: Sequence[str],
    kept: Collection[str] = (),
    device: str = "cpu",
) -> list[Any]:
    """Run once.

    Args:
        session: A session of ONNX Runtime.
        feeds: Values of the inputs by name, wherever they are.
        outputs: Names of all outputs, in order.
        kept: Those that go to ``device``; the others go to the CPU.
        device: "cpu" or "cuda".

    Raises:
        ExportError: ONNX Runtime fails, with the shapes.
    """
    try:
        if device == "cpu":
            results: list[Any] = session.run_with_ort_values(None, dict(feeds))
            return results
        return _bound(session, feeds, outputs, kept, device)
    except Exception as error:
        shapes = ", ".join(f"{name} {value.shape()}" for name, value in feeds.items())
        raise ExportError(f"ONNX Runtime failed on {shapes}: {reason_of(error)}") from error


def _bound(
    session: Any,
    feeds: Mapping[str, Any],
    outputs: Sequence[str],
    kept: Collection[str],
    device: str,
) -> list[Any]:
    # Without a binding ONNX Runtime copies every output to the CPU.
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, device if name in kept else "cpu")
    session.run_with_iobinding(binding)
    results: list[Any] = binding.get_outputs()
    return results
