"""Files that Google's Model Explorer loads: the graph, and ranks as data of its nodes.

The formats are those of its Python package: ``graph_builder.GraphCollection`` and
``node_data_builder.ModelNodeData``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from lora_fx.tools.draw.picture import Box, Picture, clean, end_of

__all__ = ["graph_of", "node_data_of"]

_GRADIENT = ("#fdf0d3", "#10917f")


def graph_of(picture: Picture) -> str:
    """The text of a graph file: boxes without children are nodes, the others their namespaces."""
    boxes = {box.id: box for box in picture.root.walk()}
    reads: dict[str, list[str]] = defaultdict(list)
    for box in boxes.values():
        for source, target in box.edges:
            into = end_of(boxes[target], last=False).id
            reads[into].append(end_of(boxes[source], last=True).id)
    nodes = []
    groups: dict[str, dict[str, str]] = {"": _attributes(picture.facts)}
    for namespace, box in _walk(picture.root, ""):
        if box.children:
            groups[namespace] = _attributes(box.facts)
            continue
        attributes = [*box.facts, *(("adapter", line.words) for line in box.branches)]
        nodes.append(
            {
                "id": box.id,
                "label": clean(box.name),
                "namespace": namespace,
                "attrs": [{"key": clean(key), "value": clean(value)} for key, value in attributes],
                "incomingEdges": [
                    {
                        "sourceNodeId": source,
                        "sourceNodeOutputId": "0",
                        "targetNodeInputId": str(place),
                    }
                    for place, source in enumerate(dict.fromkeys(reads[box.id]))
                ],
            }
        )
    graph: dict[str, Any] = {
        "id": clean(picture.title),
        "nodes": nodes,
        "groupNodeAttributes": groups,
    }
    return json.dumps({"label": clean(picture.title), "graphs": [graph]}, indent=1) + "\n"


def node_data_of(picture: Picture) -> str:
    """The text of a file of node data: the rank of each adapted operation, of several their sum."""
    ranks = {
        box.id: sum(line.rank or 0 for line in box.branches)
        for box in picture.root.walk()
        if not box.children and box.branches
    }
    low, high = _GRADIENT
    data = {
        "name": "rank",
        "results": {name: {"value": rank} for name, rank in ranks.items()},
        "gradient": [{"stop": 0, "bgColor": low}, {"stop": 1, "bgColor": high}],
    }
    return json.dumps({clean(picture.title): data}, indent=1) + "\n"


def _attributes(facts: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {clean(label): clean(value) for label, value in facts}


def _walk(box: Box, outer: str) -> Iterator[tuple[str, Box]]:
    """Every box with its namespace: of a box with children its own, of a node that of its box."""
    if not box.children:
        yield outer, box
        return
    own = clean(box.name).replace("/", "|")
    namespace = f"{outer}/{own}" if outer else own
    yield namespace, box
    names = Counter(child.name for child in box.children if child.children)
    for child in box.children:
        # Two groups of one name would be one.
        repeated = child.children and names[child.name] > 1
        inner = _walk(child, f"{namespace}/{child.id}" if repeated else namespace)
        yield from inner
