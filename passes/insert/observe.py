"""Shows what sites read: a node beside each operation hands its input to a function.

A site need not have a module: it may be a functional call, or rows of a weight. A hook would not see it; a
node in the graph does.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from lora_fx.ir import Call, Capture, PlannedSite, Region
from lora_fx.passes.graph import copy_graph

__all__ = ["See", "observed"]

See = Callable[[PlannedSite, torch.Tensor], None]
"""Takes a site and the vectors that it reads, [n, in]."""


def observed(capture: Capture, rows: Iterable[PlannedSite], see: See) -> Iterator[Region]:
    """The regions of sites, with graphs that show what these read.

    Args:
        capture: A model as graphs; neither is changed.
        rows: The sites: products of vectors with a matrix.
        see: Called whenever one is run.
    """
    work: dict[str, list[tuple[PlannedSite, Call]]] = defaultdict(list)
    for row in rows:
        for call in row.site.calls:
            if call.region in capture.regions:
                work[call.region].append((row, call))
    for key, several in work.items():
        region = capture.regions[key]
        graph = copy_graph(region.graph)
        nodes = {node.name: node for node in graph.nodes}
        for row, call in several:
            _show(graph, nodes[call.input], nodes[call.output], _observer(row, call, see))
        safe = region.falls_back(row.site for row, _ in several)
        yield dataclasses.replace(region, graph=graph, fallback=safe)


def _show(
    graph: fx.Graph, value: fx.Node, before: fx.Node, observer: Callable[[torch.Tensor], None]
) -> None:
    with graph.inserting_before(before):
        graph.call_function(observer, (value,))


def _observer(row: PlannedSite, call: Call, see: See) -> Callable[[torch.Tensor], None]:
    def observer(x: torch.Tensor) -> None:
        value = x.detach()
        # With the weight on the left the inputs are columns.
        vectors = value.mT if call.left and value.dim() > 1 else value
        see(row, vectors.reshape(-1, vectors.shape[-1]))

    return observer
