"""An ONNX file as a picture: its nodes in the modules that they come from, weights on what reads them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.export.providers import PROVIDERS, PlacementReport, import_onnxruntime
from lora_fx.export.session import OnnxSession
from lora_fx.export.structure import FileGraph, FileNode, read_graph
from lora_fx.tools.draw.nesting import nested
from lora_fx.tools.draw.picture import Box, Kind, Picture, State, human, label_of, times

__all__ = ["picture_of_file"]


_MOST_BYTES = 2**31
"""Up to this size, a file is loaded to ask which provider runs which node."""


def picture_of_file(path: Path, session: OnnxSession | None = None, provider: str = "") -> Picture:
    """Draws an ONNX file.

    Args:
        path: The file.
        session: One that runs it, and says where its nodes run.
        provider: Without a session, the provider that is asked; empty for that of the CPU.

    Raises:
        ExportError: It is missing or damaged, or the package onnx is.
    """
    graph = read_graph(path)
    placed = _placement(path, session, provider)
    root = _Painter(graph, placed if isinstance(placed, PlacementReport) else None).paint()
    elements = sum(_product(shape) for shape, _ in graph.weights.values())
    facts = [("nodes", str(len(graph.nodes))), ("stored values", human(elements))]
    facts += [(key.removeprefix("lora_fx."), value) for key, value in _told(graph)]
    if isinstance(placed, str):
        return Picture(path.name, tuple(facts), root, notes=(placed,))
    facts += [(f"on {_short(name)}", str(count)) for name, count in placed.counts.items()]
    return Picture(path.name, tuple(facts), root)


def _placement(path: Path, session: OnnxSession | None, provider: str) -> PlacementReport | str:
    """Where ONNX Runtime runs the nodes, or why that is not known."""
    try:
        if session is None:
            size = sum(one.stat().st_size for one in path.parent.glob(f"{path.stem}*"))
            if size > _MOST_BYTES:
                return (
                    "draw lora_fx.OnnxSession(path, provider) to see which provider runs which node"
                )
            chosen: Any = provider or "cpu"
            runtime = import_onnxruntime()
            # Each node as it is in the file: optimizations join nodes under new names.
            settings = runtime.SessionOptions()
            settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.log_severity_level = 3
            session = OnnxSession(path, chosen, session_options=settings)
        return session.placement()
    except LoraFxError as error:
        return f"which provider runs which node is not known: {error}"


def _short(provider: str) -> str:
    """The name of a provider as users write it."""
    return next((short for short, name in PROVIDERS.items() if name == provider), provider)


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

    def __init__(self, graph: FileGraph, placed: PlacementReport | None) -> None:
        self.graph = graph
        nodes = placed.nodes if placed is not None else ()
        self.places = {node.name: _short(node.provider) for node in nodes}
        self.elsewhere = {node.name for node in placed.elsewhere} if placed is not None else set()
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
                *self._runs_on(node),
                *((name, f"{times(shape)} {dtype}") for name, (shape, dtype) in read.items()),
                ("takes", ", ".join(node.inputs)),
                ("gives", ", ".join(node.outputs)),
            ),
            marks=(*_marks(read), *self._elsewhere(node)),
            state=State.NONE,
        )

    def _runs_on(self, node: FileNode) -> Iterator[tuple[str, str]]:
        if self.places:
            gone = "nothing: ONNX Runtime joins it with others, or computes it as it loads the file"
            yield "runs on", self.places.get(node.name, gone)

    def _elsewhere(self, node: FileNode) -> tuple[str, ...]:
        """A mark on what does work on another device than was asked for."""
        return (self.places[node.name],) if node.name in self.elsewhere else ()


def _marks(read: dict[str, tuple[tuple[int, ...], str]]) -> tuple[str, ...]:
    """Dtypes of few bits, and factors of adapters."""
    few = {
        dtype for _, dtype in read.values() if dtype.startswith(("int4", "uint4", "int8", "uint8"))
    }
    lora = {"LoRA" for name in read if ".lora_" in name}
    return (*sorted(few), *lora)
