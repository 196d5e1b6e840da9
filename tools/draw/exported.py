"""An ONNX file as a picture: its nodes in the modules that they come from, weights on what reads them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lora_fx.export.structure import FileGraph, FileNode, read_graph
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


@dataclasses.dataclass
class _Scope:
    """A module of the file: nodes and modules in the order of their first node."""

    fqn: str
    inside: dict[str, _Scope | FileNode] = dataclasses.field(default_factory=dict)
    modules: dict[str, _Scope] = dataclasses.field(default_factory=dict)


class _Painter:
    """Paints a file, parents first."""

    def __init__(self, graph: FileGraph) -> None:
        self.graph = graph
        self._ids = itertools.count()
        self._edges: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self.root = _Scope("")
        # Where each thing is: keys from the root, the last its own.
        self._paths: dict[str, tuple[str, ...]] = {}
        for name in graph.inputs:
            self._paths[f"in {name}"] = (f"in {name}",)
        for place, node in enumerate(graph.nodes):
            outer = scope = self.root
            path: list[str] = []
            for fqn in node.scope:
                path.append(f"module {fqn}")
                scope = scope.modules.setdefault(path[-1], _Scope(fqn))
                outer.inside.setdefault(path[-1], scope)
                outer = scope
            key = f"node {place}"
            scope.inside[key] = node
            self._paths[key] = (*path, key)
        self._connect()

    def _connect(self) -> None:
        """Puts every edge into the innermost module that holds both of its ends."""
        made = {name: f"in {name}" for name in self.graph.inputs}
        for place, node in enumerate(self.graph.nodes):
            made |= dict.fromkeys(node.outputs, f"node {place}")
        for place, node in enumerate(self.graph.nodes):
            for name in node.inputs:
                if name in made:
                    self._edge(self._paths[made[name]], self._paths[f"node {place}"])
        for name in self.graph.outputs:
            if name in made:
                self._edge(self._paths[made[name]], (f"out {name}",))

    def _edge(self, source: tuple[str, ...], target: tuple[str, ...]) -> None:
        shared = 0
        while source[shared] == target[shared]:
            shared += 1
        owner = "/".join(source[:shared])
        self._edges[owner][source[shared], target[shared]] = None

    def paint(self) -> Box:
        """The outermost box."""
        return self._scope(self.root, ())

    def _new_id(self) -> str:
        return f"n{next(self._ids)}"

    def _scope(self, scope: _Scope, path: tuple[str, ...]) -> Box:
        box_id = self._new_id()
        ids: dict[str, str] = {}
        children: list[Box] = []
        if not path:
            for name, words in self.graph.inputs.items():
                box = Box(
                    self._new_id(), Kind.INPUT, name, words, facts=(("input", name), ("is", words))
                )
                children.append(box)
                ids[f"in {name}"] = box.id
        for key, one in scope.inside.items():
            inner = self._scope(one, (*path, key)) if isinstance(one, _Scope) else self._node(one)
            inner = _alone(inner)
            children.append(inner)
            ids[key] = inner.id
        if not path:
            for name, words in self.graph.outputs.items():
                box = Box(
                    self._new_id(),
                    Kind.OUTPUT,
                    name,
                    words,
                    facts=(("output", name), ("is", words)),
                )
                children.append(box)
                ids[f"out {name}"] = box.id
        # A module whose nodes are run in between those of another one is left and entered again: of edges
        # both ways, those that go on in the order of the file are drawn.
        order = {key: place for place, key in enumerate(ids)}
        edges = tuple(
            (ids[a], ids[b]) for a, b in self._edges.get("/".join(path), {}) if order[a] < order[b]
        )
        name = label_of(scope.fqn) if scope.fqn else "graph"
        return Box(
            box_id,
            Kind.MODULE,
            name,
            fqn=scope.fqn,
            facts=(("module", scope.fqn or "(root)"),),
            children=tuple(children),
            edges=edges,
            flow=True,
        )

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


def _alone(box: Box) -> Box:
    """A module that is one node is that node, under its own name."""
    if len(box.children) != 1 or box.children[0].children:
        return box
    (node,) = box.children
    caption = f"{node.name} {node.caption}".strip()
    return dataclasses.replace(node, name=box.name, caption=caption, kind=Kind.LEAF)


def _marks(read: dict[str, tuple[tuple[int, ...], str]]) -> tuple[str, ...]:
    """Dtypes of few bits, and factors of adapters."""
    few = {
        dtype for _, dtype in read.values() if dtype.startswith(("int4", "uint4", "int8", "uint8"))
    }
    lora = {"LoRA" for name in read if ".lora_" in name}
    return (*sorted(few), *lora)
