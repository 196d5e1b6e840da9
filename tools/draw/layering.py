"""Layered drawing of a graph, the part that needs no sizes: which row, which order in the row.

The Sugiyama method. A row for each step of data flow; an edge that passes rows runs through dummies
in them, so that it gets a channel of its own instead of crossing boxes; orders by barycentre.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import networkx as nx

__all__ = ["DUMMY", "Layers", "Link", "layers_of"]

DUMMY = "~"
"""First character of a dummy's name."""

_SWEEPS = 12


class Link(NamedTuple):
    """One step of an edge, from a row to the next.

    Attributes:
        upper, lower: Boxes or dummies.
        source: The box that the edge comes from.
        target: The box that it leads to, one of them where edges of one source share the step.
    """

    upper: str
    lower: str
    source: str
    target: str


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """Rows of ids, from the top, and the steps of the edges between them.

    Attributes:
        rows: Ids and dummies from left to right.
        links: Every step once: edges of one source share dummies, so that an input that is read
            everywhere is one line with branches.
    """

    rows: tuple[tuple[str, ...], ...]
    links: tuple[Link, ...]


def layers_of(
    ids: Sequence[str],
    edges: Sequence[tuple[str, str]],
    first: Sequence[str] = (),
    last: Sequence[str] = (),
) -> Layers:
    """Arranges an acyclic graph in rows.

    Args:
        ids: The nodes, in the order that decides between equals.
        edges: Pairs of nodes.
        first: Nodes that belong in the top row (inputs).
        last: Nodes that belong in the bottom row (outputs).
    """
    rank = _ranks(ids, edges, first, last)
    rows: list[list[str]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name in ids:
        rows[rank[name]].append(name)
    links = _links(edges, rank, rows)
    below: dict[str, list[str]] = {name: [] for row in rows for name in row}
    above: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for upper, lower, *_ in links:
        below[upper].append(lower)
        above[lower].append(upper)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        _reorder(rows if down else rows[::-1], above if down else below)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return Layers(tuple(map(tuple, best)), tuple(links))


def _ranks(
    ids: Sequence[str],
    edges: Sequence[tuple[str, str]],
    first: Sequence[str],
    last: Sequence[str],
) -> dict[str, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(ids)
    graph.add_edges_from(edges)
    rank: dict[str, int] = {}
    order = list(
        nx.lexicographical_topological_sort(graph, key={n: i for i, n in enumerate(ids)}.get)
    )
    for name in order:
        rank[name] = max((rank[p] + 1 for p in graph.predecessors(name)), default=0)
    # What nothing flows into (constants, masks) stands just above what reads it.
    for name in reversed(order):
        if not graph.in_degree(name) and graph.out_degree(name) and name not in first:
            rank[name] = min(rank[s] for s in graph.successors(name)) - 1
    bottom = max(rank.values(), default=0)
    rank |= {name: bottom for name in last if not graph.out_degree(name)}
    return rank


def _links(
    edges: Sequence[tuple[str, str]], rank: dict[str, int], rows: list[list[str]]
) -> list[Link]:
    """The steps of all edges; puts the dummies into the rows."""
    chains: dict[str, list[str]] = {}
    links: list[Link] = []
    count = 0
    for source, target in edges:
        chain = chains.setdefault(source, [source])
        while len(chain) < rank[target] - rank[source]:
            dummy = f"{DUMMY}{count}"
            count += 1
            rows[rank[source] + len(chain)].append(dummy)
            links.append(Link(chain[-1], dummy, source, target))
            chain.append(dummy)
        links.append(Link(chain[rank[target] - rank[source] - 1], target, source, target))
    return links


def _reorder(rows: Sequence[list[str]], neighbours: dict[str, list[str]]) -> None:
    """Sorts each row by the mean place of its neighbours in the row before it, in place."""
    for before, row in itertools.pairwise(rows):
        place = {name: i for i, name in enumerate(before)}
        own = {name: i * len(before) / len(row) for i, name in enumerate(row)}
        mean = {
            name: sum(place[n] for n in near) / len(near) if near else own[name]
            for name, near in ((name, neighbours[name]) for name in row)
        }
        row.sort(key=mean.__getitem__)


def _crossings(rows: Sequence[Sequence[str]], below: dict[str, list[str]]) -> int:
    total = 0
    for row, after in itertools.pairwise(rows):
        place = {name: i for i, name in enumerate(after)}
        seen: list[int] = []
        for name in row:
            ends = sorted(place[n] for n in below[name])
            total += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
            for end in ends:
                bisect.insort(seen, end)
    return total
