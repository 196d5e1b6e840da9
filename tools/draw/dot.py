"""A picture as a networkx graph, and that as GraphML."""

from __future__ import annotations

import io
from collections.abc import Iterator

import networkx as nx

from lora_fx.tools.draw.layout import words_of
from lora_fx.tools.draw.picture import Box, Kind, Picture, clean

__all__ = ["to_dot", "to_graphml", "to_networkx"]


_COLORS: dict[Kind, tuple[str, str]] = {
    Kind.BASE: ("#e9effb", "#4a6fb5"),
    Kind.DROPOUT: ("#eef0f3", "#7c879b"),
    Kind.DOWN: ("#dcf5f0", "#10917f"),
    Kind.UP: ("#ebe4fd", "#7448d6"),
    Kind.SCALE: ("#fdf0d3", "#b97a09"),
    Kind.ADD: ("#fde3ea", "#cb3a66"),
    Kind.ADAPTER: ("#d9f1f7", "#0d7f9c"),
    Kind.SITE: ("#dcf5f0", "#10917f"),
    Kind.SKIPPED: ("#f0f1f4", "#c3c8d2"),
    Kind.REJECTED: ("#f6eeee", "#cfb3b3"),
    Kind.INPUT: ("#e8ecf4", "#b9c2d3"),
    Kind.OUTPUT: ("#e8ecf4", "#b9c2d3"),
}
_PLAIN = ("#ffffff", "#cbd2df")


def to_dot(picture: Picture) -> str:
    """The text of a DOT file."""
    boxes = {box.id: box for box in picture.root.walk()}
    lines = [
        f"digraph {_quote(picture.title)} {{",
        '  graph [compound=true, fontname="Helvetica", fontsize=12, ranksep=0.35];',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];',
        '  edge [color="#9aa5b9", arrowsize=0.6];',
        *_box(picture.root, "  "),
    ]
    for box in boxes.values():
        for source, target in box.edges:
            lines.append("  " + _edge(boxes[source], boxes[target]))
    lines.append("}")
    return "\n".join(lines) + "\n"


def _box(box: Box, indent: str) -> Iterator[str]:
    name, caption = words_of(box)
    label = _quote(f"{name}\n{caption}" if caption else name)
    if not box.children:
        fill, line = _COLORS.get(box.kind, _PLAIN)
        colors = f'fillcolor="{fill}", color="{line}"'
        yield f"{indent}{box.id} [label={label}, {colors}, tooltip={_quote(box.hover)}];"
        return
    yield f"{indent}subgraph cluster_{box.id} {{"
    style = "rounded,dashed" if box.kind is Kind.OPAQUE else "rounded"
    color = "#23a894" if box.sites else "#cbd2df"
    yield f'{indent}  graph [label={label}, style="{style}", color="{color}"];'
    for child in box.children:
        yield from _box(child, indent + "  ")
    yield f"{indent}}}"


def _edge(source: Box, target: Box) -> str:
    # DOT draws edges between nodes only; they are cut off where the cluster begins.
    options = []
    if source.children:
        options.append(f"ltail=cluster_{source.id}")
    if target.children:
        options.append(f"lhead=cluster_{target.id}")
    tail = f" [{', '.join(options)}]" if options else ""
    return f"{_end(source, last=True).id} -> {_end(target, last=False).id}{tail};"


def _end(box: Box, *, last: bool) -> Box:
    while box.children:
        wanted = Kind.OUTPUT if last else Kind.INPUT
        other = box.children[-1 if last else 0]
        box = next((child for child in box.children if child.kind is wanted), other)
    return box


def _quote(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def to_networkx(picture: Picture) -> nx.DiGraph:
    """The picture as a graph: edges are data flow, nesting is the attribute ``parent``."""
    document = picture.to_dict()
    graph = nx.DiGraph(title=clean(picture.title))
    for entry in (*document["boxes"], *document["nodes"]):
        graph.add_node(
            entry["id"],
            parent=entry["parent"] or "",
            kind=entry["kind"],
            label=clean(entry["name"]),
            caption=clean(entry["caption"]),
            fqn=clean(entry["fqn"]),
            adapter=clean(entry.get("adapter", "")),
            facts=clean("\n".join(f"{label}: {value}" for label, value in entry["facts"])),
            count=max(len(entry["repeats"]), 1),
            sites=entry["sites"],
            trainable=entry["trainable"],
            frozen=entry["frozen"],
        )
    graph.add_edges_from((edge["source"], edge["target"]) for edge in document["edges"])
    return graph


def to_graphml(picture: Picture) -> str:
    """The text of a GraphML file."""
    buffer = io.BytesIO()
    nx.write_graphml_xml(to_networkx(picture), buffer)
    return buffer.getvalue().decode("utf-8")
