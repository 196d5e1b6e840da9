"""Reading an ``ExportReport`` off the graph, the trace and the comparison."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.export.trace.tracing import Trace
from lora_fx.export.verify.parity import Parity

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["graph_facts", "node_count"]

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
