"""An ONNX file as a picture: its nodes in the modules that they come from, weights on what reads them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lora_fx.export.structure import FileGraph, FileNode, read_graph
from lora_fx.tools.draw.nesting import nested
from lora_fx.tools.draw.picture import Box, Kind, Picture, State, human, label_of, times

__all__ = ["picture_of_file"]


def picture_of_file(path: Path) -> Picture:
    """Draws an ONNX file.

    Raises:
        ExportError: It is missing or damaged, or the package onnx is.
    """
    graph = read_graph(path)
    root = _Painter(graph).paint()
    elements = sum(_product(shape) for shape, _ in graph.weights.values())
    facts = [("nodes", str(len(graph.nodes))), ("stored values", human(elements))]
    facts += [(key.removeprefix("lora_fx."), value) for key, value in _told(graph)]
    return Picture(path.name, tuple(facts), root)


def _told(graph: FileGraph) -> Iterator[tuple[str, str]]:
    """What a file of lora_fx says of itself in a word or two."""
    for key in ("lora_fx.dtype", "lora_fx.opset"):
        if key in graph.metadata:
            yield key, graph.metadata[key]
    merged = graph.metadata.get("lora_fx.merged")
    if merged is not None:
        yield "merged", ", ".join(json.loads(merged)) or "none"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


class _Painter:
    """Paints a file, parents first."""

    def __init__(self, graph: FileGraph) -> None:
        self.graph = graph
        self._ids = itertools.count()

    def paint(self) -> Box:
        """The outermost box."""
        inputs = {name: self._end(Kind.INPUT, name, is_) for name, is_ in self.graph.inputs.items()}
        nodes = [self._node(node) for node in self.graph.nodes]
        outputs = {
            name: self._end(Kind.OUTPUT, name, is_) for name, is_ in self.graph.outputs.items()
        }
        made = {name: box.id for name, box in inputs.items()}
        edges: list[tuple[str, str]] = []
        for node, box in zip(self.graph.nodes, nodes, strict=True):
            edges += [(made[name], box.id) for name in node.inputs if name in made]
            made |= dict.fromkeys(node.outputs, box.id)
        edges += [(made[name], box.id) for name, box in outputs.items() if name in made]
        scopes = [node.scope for node in self.graph.nodes]
        placed = [
            *(((), box) for box in inputs.values()),
            *zip(scopes, nodes, strict=True),
            *(((), box) for box in outputs.values()),
        ]
        children, inner = nested(placed, edges, self._module)
        return dataclasses.replace(self._module("", children, inner), name="graph")

    def _new_id(self) -> str:
        return f"n{next(self._ids)}"

    def _end(self, kind: Kind, name: str, words: str) -> Box:
        return Box(self._new_id(), kind, name, words, facts=((str(kind), name), ("is", words)))

    def _module(
        self, fqn: str, children: tuple[Box, ...], edges: tuple[tuple[str, str], ...]
    ) -> Box:
        facts = (("module", fqn or "(root)"),)
        name = label_of(fqn)
        return Box(self._new_id(), Kind.MODULE, name, "", fqn, facts, children, edges, flow=True)

    def _node(self, node: FileNode) -> Box:
        read = {
            name: self.graph.weights[name] for name in node.inputs if name in self.graph.weights
        }
        first = next(iter(read.values()), None)
        fqn = node.scope[-1] if node.scope else ""
        return Box(
            self._new_id(),
            Kind.OP,
            node.operator,
            "" if first is None else times(first[0]),
            fqn=fqn,
            facts=(
                ("node", node.name),
                ("operator", node.operator),
                ("module", fqn or "(root)"),
                *((name, f"{times(shape)} {dtype}") for name, (shape, dtype) in read.items()),
                ("takes", ", ".join(node.inputs)),
                ("gives", ", ".join(node.outputs)),
            ),
            marks=_marks(read),
            state=State.NONE,
        )


def _marks(read: dict[str, tuple[tuple[int, ...], str]]) -> tuple[str, ...]:
    """Dtypes of few bits, and factors of adapters."""
    few = {
        dtype for _, dtype in read.values() if dtype.startswith(("int4", "uint4", "int8", "uint8"))
    }
    lora = {"LoRA" for name in read if ".lora_" in name}
    return (*sorted(few), *lora)
