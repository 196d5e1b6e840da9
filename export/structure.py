"""The graph of an ONNX file as plain data: its nodes, the modules that they come from, and the weights."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.errors import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["FileGraph", "FileNode", "read_graph"]


@dataclasses.dataclass(frozen=True)
class FileNode:
    """A node of a file.

    Attributes:
        name: Its name in the file.
        operator: What it computes, with the domain where that is not ONNX's own.
        scope: FQNs of the modules that it comes from, the outermost first; empty where the file does not say.
        inputs, outputs: Names of values; absent inputs are left out.
    """

    name: str
    operator: str
    scope: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FileGraph:
    """The graph of a file.

    Attributes:
        inputs, outputs: Name of a value to what it is, in words: ``[batch, 3] float32``.
        weights: Name of a stored tensor to its shape and dtype.
        nodes: In the order in which they can run.
        metadata: What the file says of itself.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    weights: Mapping[str, tuple[tuple[int, ...], str]]
    nodes: tuple[FileNode, ...]
    metadata: Mapping[str, str]


def read_graph(path: Path) -> FileGraph:
    """Reads the graph of an ONNX file; weights stay where they are.

    Raises:
        ExportError: It is missing or damaged, or the package onnx is.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("an ONNX file is read with onnx: pip install 'lora-fx[onnx]'") from error
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path} is damaged or no ONNX file: export it again") from error
    graph = model.graph
    weights = {one.name: (tuple(one.dims), _dtype(one.data_type)) for one in graph.initializer}
    return FileGraph(
        inputs={one.name: _value(one) for one in graph.input if one.name not in weights},
        outputs={one.name: _value(one) for one in graph.output},
        weights=weights,
        nodes=tuple(map(_node, graph.node)),
        metadata={one.key: one.value for one in model.metadata_props},
    )


def _node(node: onnx.NodeProto) -> FileNode:
    told = {one.key: one.value for one in node.metadata_props}
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return FileNode(
        node.name,
        operator,
        _scope(told.get("pkg.torch.onnx.name_scopes", "")),
        tuple(filter(None, node.input)),
        tuple(filter(None, node.output)),
    )


# What torch.export says of a node that is in no module.
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"


def _scope(text: str) -> tuple[str, ...]:
    """The modules of a node: a list of names, of which the last is that of the node in its graph."""
    try:
        names = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return ()
    if not isinstance(names, list):
        return ()
    return tuple(str(name) for name in names[:-1] if name and name != _NOWHERE)


def _dtype(kind: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(kind)).lower()


def _value(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [one.dim_param or str(one.dim_value) for one in tensor.shape.dim]
    return f"[{', '.join(sizes)}] {_dtype(tensor.elem_type)}"
