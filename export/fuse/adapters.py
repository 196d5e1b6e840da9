"""Adapters in a finished graph: the nodes that read factors, and guards against wrong ids and no inputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.export.adapter_manifest import SLOTS_INPUT, Manifest
from lora_fx.export.fuse.graph import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ADAPTER_NODES_KEY", "adapter_nodes", "guard_ids", "guard_sizes"]

ADAPTER_NODES_KEY = "lora_fx.adapter_nodes"
"""Metadata entry with the names of the nodes that read factors, as JSON: quantizers have to exclude them."""

_FACTOR = re.compile(r"(^|\.)lora_[A-Za-z_]+(\.|$)")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_CACHE = "present."  # outputs that are inputs of the next run


def adapter_nodes(model: ir.Model, manifest: Manifest | None) -> tuple[str, ...]:
    """Return the names of the nodes that read factors, or values that are computed from factors and ids.

    Args:
        model: The graph. Nodes without a name get one.
        manifest: The adapter inputs; None for a file whose adapters are constants or merged.
    """
    from onnx_ir.passes.common import NameFixPass

    NameFixPass()(model)
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    if manifest is None:
        names = {name for name in values if name is not None and _FACTOR.search(name)}
    else:
        names = {*manifest.inputs, *manifest.choosing}
    known = {values[name] for name in names & values.keys()}
    readers = []
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if not any(value in known for value in read):
            continue
        readers.append(str(node.name))
        if node.op_type == "Gemm":  # quantizers make a MatMul of it first, with this name
            readers.append(f"{node.name}_MatMul")
        if all(value in known or value.const_value is not None for value in read):
            known.update(node.outputs)
    return tuple(readers)


def guard_ids(model: ir.Model, manifest: Manifest) -> None:
    """Make a run with an id out of range fail: by an error of ``Gather``, or by NaN in the outputs.

    ONNX leaves such an index to the runtime. Some runtimes raise; others read zeros, another adapter, or
    memory behind the bank. So the ids are first looked up in a list of the slots, and a runtime that checks
    indices raises. In other runtimes the row runs without an adapter, and NaN is added to its outputs, except
    to integers and to the cache of a decoder.

    Args:
        model: Changed in place, after all fusions.
        manifest: The adapter inputs of a file with a bank.
    """
    import onnx_ir as ir

    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    ids, bank = values[SLOTS_INPUT], values[next(iter(manifest.inputs))]
    users = list(ids.uses())
    if not users:
        return
    build = Builder(model, graph[0])
    rows = list(ids.shape or ())
    minus, zero, step = (build.ints(number) for number in (-1, 0, 1))
    size = build.op("Shape", [bank], {"start": 0, "end": 1}, shape=[1])
    count = build.op("Squeeze", [size], like=ids, shape=[])
    slots = build.op("Range", [zero, count, step], like=ids, shape=[None])
    positive = build.op("Max", [ids, minus], like=ids, shape=rows)
    # The index is at most one past the end, because OpenVINO crashes on larger ones, and the next sum could
    # overflow.
    first_wrong = build.op("Sub", [count, step], like=ids, shape=[])
    near = build.op("Min", [positive, first_wrong], like=ids, shape=rows)
    slot = build.op("Add", [near, step], like=ids, shape=rows)
    exists = build.op("Less", [slot, count], shape=rows)
    exists.dtype = ir.DataType.BOOL
    looked_up = build.op("Gather", [slots, slot], {"axis": 0}, like=ids, shape=rows)
    own = build.op("Sub", [looked_up, step], like=ids, shape=rows)
    safe = build.op("Where", [exists, own, minus], like=ids, shape=rows)
    for node, position in users:
        node.replace_input_with(position, safe)
    _spoil(model, exists)


def guard_sizes(model: ir.Model, manifest: Manifest) -> None:
    """Make the outputs NaN if an adapter input is empty, because OpenVINO gives size 0 to unfed inputs.

    For an unfed input of fixed sizes, OpenVINO reads memory with arbitrary values. So inputs without a rank
    get a dynamic first axis. Kernels and biases of convolutions stay fixed, because OpenVINO takes no others.

    Args:
        model: Changed in place, after all fusions.
        manifest: The adapter inputs of a file in which they are required.
    """
    import onnx_ir as ir

    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    build = Builder(model, graph[0])
    sizes = []
    for index, entry in enumerate(manifest.inputs.values()):
        axis, value = entry.rank_axis, values[entry.name]
        convolves = any(node.op_type in _CONVOLUTIONS for node, _ in value.uses())
        if axis is None and not convolves:
            axis = 0
            value.shape = ir.Shape([f"adapter_size_{index}", *entry.shape[1:]])
        if axis is not None and list(value.uses()):
            between = {"start": axis, "end": axis + 1}
            sizes.append(build.op("Shape", [value], between, shape=[1]))
    if not sizes:
        return
    every = build.op("Concat", sizes, {"axis": 0}, like=sizes[0], shape=[len(sizes)])
    least = build.op("ReduceMin", [every], {"keepdims": 1}, like=every, shape=[1])
    exists = build.op("Greater", [least, build.ints(0)], shape=[1])
    exists.dtype = ir.DataType.BOOL
    _spoil(model, exists)


def _spoil(model: ir.Model, exists: ir.Value) -> None:
    """Add NaN to the rows of the outputs whose adapters do not exist.

    Args:
        model: Changed in place.
        exists: True for each row whose adapter exists, [rows]. A single element is for the whole batch.
    """
    import onnx_ir as ir

    graph = model.graph
    end = ir.node("Identity", [exists])  # new nodes are inserted before it
    graph.append(end)
    build = Builder(model, end)
    rows = list(exists.shape or ())
    right, nan = (build.constant(np.array(number, np.float32)) for number in (0.0, np.nan))
    wrong = build.op("Where", [exists, right, nan], like=right, shape=rows)
    added: dict[tuple[ir.DataType, int], ir.Value] = {}
    for index, value in enumerate(graph.outputs):
        name, dtype, shape = str(value.name), value.dtype, value.shape
        if dtype is None or not dtype.is_floating_point() or not shape or name.startswith(_CACHE):
            continue
        key = dtype, len(shape)
        if key not in added:
            typed = build.op("Cast", [wrong], {"to": dtype}, shape=rows)
            axes = list(range(1, len(shape)))
            sizes = [*rows, *[1] * len(axes)]
            added[key] = build.op("Unsqueeze", [typed, build.ints(axes)], like=typed, shape=sizes)
        value.name = f"{name}.unguarded"
        out = build.op("Add", [value, added[key]], like=value, shape=list(shape))
        out.name = name
        graph.outputs[index] = out
    graph.remove(end, safe=True)
