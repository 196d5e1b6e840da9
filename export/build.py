"""One file of an export: traced, converted, written beside its place and compared there."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_fx.errors import ParityError
from lora_fx.export.convert import ConversionError, convert, torch_export_context
from lora_fx.export.copy import stored_formats
from lora_fx.export.prepare import Prepared
from lora_fx.export.report import ExportReport
from lora_fx.export.staging import Staging, write
from lora_fx.export.trace import Trace, headline, trace
from lora_fx.export.verify import Parity, PrecisionError, Verdict
from lora_fx.export.verify import verify as verify_file

if TYPE_CHECKING:
    import onnx_ir as ir


__all__ = [
    "BF16_OPSET",
    "DEFAULT_OPSET",
    "Options",
    "Stages",
    "build",
    "graph_facts",
    "node_count",
]


_log = logging.getLogger("lora_fx")


class Stages:
    """One stage is open at a time.

    Attributes:
        seconds: Wall-clock seconds of each stage, in order; one that came twice has both.
    """

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._open: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        """End the open stage and begin another."""
        self.stop()
        self._open = (stage, time.perf_counter())
        _log.info("export: %s", stage)
        if self._progress is not None:
            self._progress(stage)

    def stop(self) -> None:
        """End the open stage."""
        if self._open is not None:
            stage, began = self._open
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self._open = None


_PACKAGES = ("lora-fx", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu")


def graph_facts(trace: Trace, model: ir.Model, parity: Parity | None) -> dict[str, Any]:
    """The fields of an ``ExportReport`` that say what is in the file and how it was checked."""
    names_of = trace.arguments.names
    axes = dict(zip(names_of, trace.axes, strict=True))
    tried = parity.tried if parity else []
    skipped = parity.skipped if parity else {}
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    return {
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "initializers": len(model.graph.initializers),
        "inputs": {name: tuple(axis.label for axis in row) for name, row in axes.items()},
        "outputs": {value.name: _axes_of(value) for value in model.graph.outputs},
        "dynamic_axes": trace.dynamic_axes(),
        "axis_limits": trace.axis_limits(),
        "fixed_axes": {
            f"{name}[{index}]": axis.reason
            for name, row in axes.items()
            for index, axis in enumerate(row)
            if axis.name is None
        },
        "baked_arguments": dict(trace.arguments.baked),
        "finite": trace.finite,
        "verified": parity is not None,
        "reference": parity.reference if parity else "",
        "parity": tuple(parity.rows.values()) if parity else (),
        "shapes_tried": tuple(dict(zip(names_of, sizes, strict=True)) for sizes in tried),
        "values_tried": parity.note if parity else "",
        "shapes_skipped": {
            ", ".join(f"{name} {list(size)}" for name, size in zip(names_of, sizes, strict=True)): (
                reason
            )
            for sizes, reason in skipped.items()
        },
        "metadata": dict(model.metadata_props),
        "versions": _versions(),
    }


def node_count(path: Path) -> int:
    """How many nodes a file has, those inside of others included."""
    import onnx_ir as ir

    return sum(1 for _ in ir.load(path).graph.all_nodes())


def _axes_of(value: ir.Value) -> tuple[int | str, ...]:
    shape = () if value.shape is None else value.shape
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in shape)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


DEFAULT_OPSET = 20
BF16_OPSET = 22

_REASONS = {
    DEFAULT_OPSET: "what both providers run in fp32 and fp16",
    BF16_OPSET: "the first in which convolutions and pooling take bf16",
}


@dataclass(frozen=True)
class Options:
    """What holds for all files of an export.

    Attributes:
        opset: ONNX opset; None for that of the dtype.
        verify: Whether to compare the file with PyTorch.
        external_data_bytes: Bytes of weights from which they go into files of their own.
        shard_bytes: Bytes of one such file.
        keep: Takes each weight that is made anew, see ``Scratch.keep``.
        clock: What says and times the stages.
    """

    opset: int | None
    verify: bool
    external_data_bytes: int
    shard_bytes: int
    keep: Callable[[Tensor], Tensor]
    clock: Stages


def build(
    prepared: Prepared, stage: Staging, options: Options, dynamic_shapes: object = None
) -> ExportReport:
    """Write the file of a model into its staging folder.

    Args:
        prepared: The model.
        stage: Where to. It is not moved into place.
        options: What holds for all files.
        dynamic_shapes: The user's; None for the task's, or for every axis that can be dynamic.

    Returns:
        The report of this file, without the stages and what the whole export knows.

    Raises:
        ParityError: The file computes something else.
        ExportError: The model cannot be captured or converted, or the disk is full.
    """
    clock, opset, why = options.clock, options.opset, "asked for"
    if opset is None:
        opset = BF16_OPSET if prepared.dtype == "bf16" else DEFAULT_OPSET
        why = _REASONS[opset]
    failures: list[str] = []
    original, prepared = prepared, prepared.to_trace(options.keep)
    traced = _traced(prepared, dynamic_shapes, failures, 0)
    while True:
        assert traced is not None
        try:
            clock.start("converting to ONNX")
            program = convert(traced, prepared, opset)
            clock.start("writing the file")
            files = write(program, stage, options.external_data_bytes, options.shard_bytes)
            verdict = Verdict(reason="verify=False")
            if options.verify:
                clock.start("comparing with PyTorch in ONNX Runtime")
                large = stage.has_data()
                verdict = verify_file(original, traced, stage.model, options.keep, large=large)
            break
        except PrecisionError:
            raise
        except (ConversionError, ParityError) as error:
            # What a model does with sizes may be no ONNX: with fewer dynamic axes it may be one.
            failures.append(f"{traced.description}: {headline(error)}")
            stage.discard()
            clock.start("capturing the model with fewer dynamic axes")
            traced = _traced(prepared, dynamic_shapes, failures, traced.attempt + 1)
            if traced is None:
                raise
            _log.warning("export with fewer dynamic axes: %s", failures[-1])
    return ExportReport(
        path=str(stage.target),
        files=files,
        opset=opset,
        opset_reason=why,
        dtype=prepared.dtype,
        quantized=stored_formats(prepared.model.model, program.graph.initializers),
        unverified_reason=verdict.reason,
        provider=verdict.provider,
        seconds={},
        swappable=tuple(site.name for site in prepared.manifest.sites) if prepared.manifest else (),
        **graph_facts(traced, program, verdict.parity),
    )


def _traced(
    prepared: Prepared, dynamic_shapes: object, failures: list[str], attempt: int
) -> Trace | None:
    task = dynamic_shapes is None and prepared.dynamic_shapes is not None
    wanted = prepared.dynamic_shapes if task else dynamic_shapes
    with torch_export_context():
        return trace(prepared.model, prepared.arguments, wanted, failures, attempt, task=task)
