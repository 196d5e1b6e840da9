"""A picture as a networkx graph, and that as GraphML."""

from __future__ import annotations

import io

import networkx as nx

from lora_fx.tools.draw.picture import Picture, clean

__all__ = ["to_graphml", "to_networkx"]


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
