"""Inspection of an ONNX file: its graph as plain data, and checks of its weights and adapter inputs."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import CheckpointError, ExportError, some
from lora_fx.export.adapter_manifest import SUFFIXES, Manifest
from lora_fx.extras import load_optional

if TYPE_CHECKING:
    import onnx

__all__ = [
    "FileGraph",
    "FileNode",
    "Finding",
    "State",
    "examine_file",
    "metadata_of",
    "read_defaults",
    "read_file",
    "read_graph",
]


@dataclasses.dataclass(frozen=True)
class FileNode:
    """Node of a file.

    Attributes:
        name: Its name in the file.
        operator: Its operator, with the domain if that is not ONNX's own.
        scope: FQNs of its modules, the outermost first; empty if the file does not have them.
        inputs, outputs: Names of values; absent inputs are left out.
    """

    name: str
    operator: str
    scope: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileGraph:
    """Graph of a file.

    Attributes:
        inputs, outputs: Shapes and dtypes by name of the value: ``[batch, 3] float32``.
        weights: Shapes and dtypes of stored tensors by name.
        nodes: The nodes in an order in which they can run.
        metadata: Metadata entries of the file.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    weights: Mapping[str, tuple[tuple[int, ...], str]]
    nodes: tuple[FileNode, ...]
    metadata: Mapping[str, str]


def read_file(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data.

    Raises:
        ExportError: The file is missing or damaged, or the package onnx is missing.
    """
    onnx = load_optional("onnx", "reading an ONNX file", "lora-fx[onnx]", error=ExportError)
    if not path.is_file():
        raise ExportError(f"there is no file {path}: export a model to it first")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path} is damaged or no ONNX file: export it again") from error


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata entries of a file."""
    return {entry.key: entry.value for entry in model.metadata_props}


def read_graph(path: Path) -> FileGraph:
    """Read the graph of an ONNX file without its external data.

    Raises:
        ExportError: The file is missing or damaged, or the package onnx is missing.
    """
    model = read_file(path)
    graph = model.graph
    weights = {
        tensor.name: (tuple(tensor.dims), _dtype(tensor.data_type)) for tensor in graph.initializer
    }
    return FileGraph(
        inputs={value.name: _value(value) for value in graph.input if value.name not in weights},
        outputs={value.name: _value(value) for value in graph.output},
        weights=weights,
        nodes=tuple(map(_node, graph.node)),
        metadata=metadata_of(model),
    )


def read_defaults(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Read the defaults of inputs from a file that is open, because ONNX Runtime does not expose them.

    Args:
        path: The ``.onnx`` file.
        names: Names of the inputs.

    Raises:
        ExportError: onnx is not installed, or the file cannot be read.
        CheckpointError: The file lacks a default.
    """
    purpose = f"reading the adapters in {path.name}"
    for package in ("onnx", "onnx_ir"):
        load_optional(package, purpose, "lora-fx[onnx]", error=ExportError)
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    tensors = {}
    try:
        proto = onnx.load(str(path), load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.name in names:
                if uses_external_data(tensor):
                    load_external_data_for_tensor(tensor, str(path.parent))
                tensors[tensor.name] = _values(tensor)
    except Exception as error:
        raise ExportError(
            f"{path} cannot be read again: were its files moved or changed while the session was open? "
            f"{error}"
        ) from error
    lost = [name for name in names if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{path.name} lacks {some(lost)}: a tool took them for constants. Export the model again"
        )
    return tensors


def _values(tensor: onnx.TensorProto) -> Tensor:
    import onnx_ir as ir

    value = ir.from_proto(tensor)
    if value.dtype == ir.DataType.BFLOAT16:
        raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.bfloat16)
        return raw.view(*value.shape.numpy())
    return torch.from_numpy(value.numpy().copy())


def _node(node: onnx.NodeProto) -> FileNode:
    properties = {entry.key: entry.value for entry in node.metadata_props}
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return FileNode(
        node.name,
        operator,
        _scope(properties.get("pkg.torch.onnx.name_scopes", "")),
        tuple(filter(None, node.input)),
        tuple(filter(None, node.output)),
    )


def _scope(text: str) -> tuple[str, ...]:
    """Return the FQNs of the modules of a node from the list in its metadata, without the node's own name."""
    try:
        names = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return ()
    if not isinstance(names, list):
        return ()
    return tuple(str(name) for name in names[:-1] if name and name != torch_private.NO_MODULE)


def _dtype(kind: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(kind)).lower()


def _value(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"[{', '.join(sizes)}] {_dtype(tensor.elem_type)}"


# --- checks of a file -----------------------------------------------------------------------------


class State(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check of a file: a line of the report.

    Attributes:
        topic: Heading that the line belongs to.
        name: The item that was checked.
        state: ``problem`` if something is broken, ``note`` if something is only absent.
        detail: Result of the check.
        remedy: Remedy of a problem, or "".
    """

    topic: str
    name: str
    state: State
    detail: str
    remedy: str = ""


_FOLDED = (
    "a tool took them for constants (optimizers and quantizers do, as onnxslim, onnxsim and "
    "quantize_dynamic): an adapter would change nothing. Export again with required_inputs=True, and exclude "
    "the nodes in the metadata lora_fx.adapter_nodes from a quantizer"
)


def examine_file(path: Path) -> list[Finding]:
    """Check an ONNX file: its weights, its operators, and if its adapter inputs still have an effect.

    Raises:
        ExportError: The file is missing, damaged, or from a newer lora_fx.
    """
    load_optional("onnx_ir", "examining an ONNX file", "lora-fx[onnx]", error=ExportError)
    model = read_file(path)
    if not model.graph.output:
        # An empty file parses as a message without fields.
        raise ExportError(f"{path} is empty, a model without outputs: export it again")
    return [*_operators(model), *_weights(model, path), *_adapter_inputs(model)]


def _operators(model: onnx.ModelProto) -> Iterator[Finding]:
    topic = "file"
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    yield Finding(topic, "opset", State.OK, ", ".join(f"{k} {v}" for k, v in opsets.items()))
    other = Counter(
        f"{node.domain}.{node.op_type}"
        for graph in _graphs(model.graph)
        for node in graph.node
        if node.domain not in ("", "ai.onnx")
    )
    if other:
        detail = ", ".join(f"{count} {name}" for name, count in other.most_common())
        yield Finding(
            topic, "operators of ONNX Runtime", State.NOTE, detail, "other runtimes lack them"
        )


def _weights(model: onnx.ModelProto, path: Path) -> Iterator[Finding]:
    from onnx.external_data_helper import ExternalDataInfo

    topic = "weights"
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        size = _bytes_of(tensor)
        try:
            info = ExternalDataInfo(tensor)
            start, length = int(info.offset or 0), int(info.length or size)
        except ValueError as error:
            yield Finding(topic, tensor.name, State.PROBLEM, str(error), "export it again")
            continue
        if length != size or not info.location:
            detail = f"{length} bytes in {info.location or 'no file'}, where its shape needs {size}"
            yield Finding(topic, tensor.name, State.PROBLEM, detail, "export it again")
        else:
            ends[info.location] = max(ends.get(info.location, 0), start + length)
    for name, end in sorted(ends.items()):
        data = path.parent / name
        # Links are not resolved, because download caches link to files in other folders.
        if not Path(os.path.normpath(data.absolute())).is_relative_to(path.parent.absolute()):
            detail = f"outside {path.parent}, where runtimes do not read"
            remedy = f"copy it next to {path.name}, and export it again"
            yield Finding(topic, name, State.PROBLEM, detail, remedy)
        elif not data.is_file():
            yield Finding(topic, name, State.PROBLEM, "missing", f"copy it next to {path.name}")
        elif data.stat().st_size < end:
            size = data.stat().st_size
            detail = f"{size} bytes, where the weights need {end}"
            yield Finding(topic, name, State.PROBLEM, detail, "copy it again")
        else:
            yield Finding(topic, name, State.OK, f"{data.stat().st_size} bytes")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the constants of all graphs, both initializers and attributes."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _bytes_of(tensor: onnx.TensorProto) -> int:
    import onnx_ir as ir

    count: int = math.prod(tensor.dims)
    width: float = ir.DataType(tensor.data_type).itemsize
    return math.ceil(count * width)


def _adapter_inputs(model: onnx.ModelProto) -> Iterator[Finding]:
    topic = "adapters"
    manifest = Manifest.from_metadata(metadata_of(model))
    inputs = {value.name for value in model.graph.input}
    read = {name for graph in _graphs(model.graph) for node in graph.node for name in node.input}
    if manifest is None:
        ends = tuple(f".{end}" for end in SUFFIXES.values())
        like = [name for name in inputs if name.endswith(ends)]
        if like:
            detail = f"{len(like)} inputs look like factors, and the file does not say what for"
            remedy = "a tool dropped the metadata of lora_fx: export again"
            yield Finding(topic, "metadata", State.PROBLEM, detail, remedy)
        else:
            yield Finding(topic, "inputs", State.OK, "none: the file takes no adapters")
        return
    if manifest.bank is not None:
        yield Finding(topic, "bank", State.OK, str(manifest.bank))
        own = ", ".join(manifest.bank.adapters) or "none yet"
        yield Finding(topic, "in the file", State.OK, own)
    lost, constant = manifest.missing(inputs)
    wanted = list(dict.fromkeys((*manifest.choosing, *manifest.replaceable)))
    idle = [name for name in wanted if name in inputs and name not in read]
    detail = f"{len(wanted)} at {len(manifest.sites)} sites"
    if manifest.required:
        detail += ", without defaults"
    if lost:
        text = f"{len(lost)} of {detail} are gone: {some(lost, 3)}"
        yield Finding(topic, "inputs", State.PROBLEM, text, _FOLDED)
    elif idle:
        text = f"{len(idle)} of {detail} are read by no node: {some(idle, 3)}"
        yield Finding(topic, "inputs", State.PROBLEM, text, _FOLDED)
    else:
        yield Finding(topic, "inputs", State.OK, detail)
    if constant and manifest.bank is not None:
        text = f"a tool made constants of {len(constant)} factors"
        remedy = "the adapters in the file run; to load others, export again without that tool"
        yield Finding(topic, "further adapters", State.NOTE, text, remedy)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
