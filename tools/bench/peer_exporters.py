"""Files that others have exported: how large they are, and whether they compute what PyTorch does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.export.facts import node_count
from lora_fx.export.ort.binding import bound_run
from lora_fx.export.ort.loading import load
from lora_fx.export.ort.ports import feed, port_of, to_tensor
from lora_fx.export.ort.providers import import_onnxruntime
from lora_fx.export.ort.settings import session_settings

__all__ = ["File", "Runner", "describe", "largest_error", "runner"]

Runner = Callable[[Mapping[str, Tensor]], Tensor]
"""From the inputs of the model to its first output."""


@dataclasses.dataclass(frozen=True)
class File:
    """What is in a file.

    Attributes:
        size: Bytes, external data included.
        nodes: Nodes as written, before ONNX Runtime optimises them.
    """

    size: int
    nodes: int


def describe(path: Path) -> File:
    """Reads what is there."""
    size = sum(
        one.stat().st_size for one in path.parent.glob(f"{path.stem}*.onnx*") if one.is_file()
    )
    return File(size, node_count(path))


def runner(path: Path, adapter: Path | None = None) -> Runner:
    """Runs a file on the CPU, as it is: with what it takes of ids, mask, positions and types of tokens.

    Args:
        path: The file.
        adapter: Values for inputs that are an adapter, in ONNX Runtime's format.

    Raises:
        ExportError: It cannot be loaded; and, from a run, it fails or takes something else.
    """
    runtime = import_onnxruntime()
    session = load(runtime, path, "cpu", {}, session_settings(runtime, None, low_memory=False))
    ports = [port_of(value) for value in session.get_inputs()]
    outputs = [port_of(value) for value in session.get_outputs()][:1]
    held = runtime.AdapterFormat.read_adapter(str(adapter)) if adapter is not None else None

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        values = _completed(inputs)
        # The values of an adapter lie in the memory of what was read.
        factors: dict[str, Any] = held.get_parameters() if held is not None else {}
        missing = [port.name for port in ports if port.name not in {*values, *factors}]
        if missing:
            raise ExportError(f"it takes {', '.join(missing)} as well")
        feeds = {
            port.name: feed(runtime, port, values[port.name])
            for port in ports
            if port.name in values
        }
        [result] = bound_run(session, feeds, factors, outputs)
        return to_tensor(result).clone()

    return run


def largest_error(run: Runner, references: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> float:
    """The largest difference of an element, beside the largest element: the worst of the inputs.

    Raises:
        ExportError: The file fails on one of them, or its output has another shape.
    """
    errors = []
    for inputs, expected in references:
        found = run(inputs)
        if found.shape != expected.shape:
            raise ExportError(
                f"it gives {list(found.shape)} for {list(inputs['input_ids'].shape)}, "
                f"PyTorch {list(expected.shape)}"
            )
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    # max() of a list with a NaN may be another one of them.
    return torch.tensor(errors).max().item()


def _completed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what exporters make inputs of, as transformers fills it in."""
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {**inputs, "position_ids": positions, "token_type_ids": torch.zeros_like(ids)}
