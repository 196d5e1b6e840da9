"""Layout of a picture: sizes, coordinates and routes of edges, in pixels.

Rows, the order and preferred centers in a row, and the ends of edges are computed here once, for closed
boxes. :func:`place` then stacks the rows. The HTML page, in which boxes open and close, contains these rows
and only stacks them again (``viewer/place.js``). A test compares the two.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import networkx as nx

from lora_fx.tools.draw.picture import Box, Branch, Kind, Picture, clean, elide

__all__ = [
    "CAPTION_CHAR",
    "CHIPS",
    "METRICS",
    "Placed",
    "Point",
    "Scene",
    "count_of",
    "lines_of",
    "mark_width",
    "place",
    "plan_layers",
    "sizes_of",
    "words_of",
]


DUMMY = "~"
"""First character of a dummy's name. A dummy keeps room for an edge in a row that the edge passes."""

_SWEEPS = 12


class Link(NamedTuple):
    """The segment of an edge between two neighboring rows. Edges from the same box may share segments.

    Attributes:
        upper, lower: The ends of the segment: ids of boxes or, if the edge passes through a row, dummies.
        source: The box where the edge starts.
        target: The box where the edge ends, or one of these boxes if several edges share the segment.
    """

    upper: str
    lower: str
    source: str
    target: str


@dataclasses.dataclass(frozen=True, slots=True)
class Layers:
    """Arrangement of the children of a box in rows, from top to bottom.

    Attributes:
        rows: For each row, the ids of boxes and dummies from left to right.
        links: The segments of all edges. Edges from the same box share dummies, so that an input with many
            readers is one line with branches.
        centers: Horizontal center of each box and dummy if every box is closed.
        ports: For each link, its index from the left among the links with the same lower end, and the number
            of these links.
    """

    rows: tuple[tuple[str, ...], ...]
    links: tuple[Link, ...]
    centers: Mapping[str, float]
    ports: tuple[tuple[int, int], ...]


def layers_of(
    ids: Sequence[str],
    edges: Sequence[tuple[str, str]],
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    widths: Mapping[str, float] | None = None,
) -> Layers:
    """Arrange an acyclic graph in rows.

    Args:
        ids: The nodes, in the order that breaks ties.
        edges: Pairs of nodes.
        first: Nodes that belong in the top row (inputs).
        last: Nodes that belong in the bottom row (outputs).
        widths: Widths of closed nodes, 100 by default.
    """
    rank = _ranks(ids, edges, first, last)
    rows: list[list[str]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name in ids:
        rows[rank[name]].append(name)
    links = _links(edges, rank, rows)
    above, below = _neighbors(links)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        _reorder(rows if down else rows[::-1], above if down else below)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    wide = {
        name: METRICS["dummy"] if name.startswith(DUMMY) else (widths or {}).get(name, 100.0)
        for row in best
        for name in row
    }
    centers = _centers(best, links, wide)
    return Layers(tuple(map(tuple, best)), tuple(links), centers, _ports(links, centers))


def _ranks(
    ids: Sequence[str], edges: Sequence[tuple[str, str]], first: Sequence[str], last: Sequence[str]
) -> dict[str, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(ids)
    graph.add_edges_from(edges)
    rank = {n: i for i, row in enumerate(nx.topological_generations(graph)) for n in row}
    # Nodes without inputs (constants, masks) go just above their first reader.
    for name in ids:
        if not graph.in_degree(name) and graph.out_degree(name) and name not in first:
            rank[name] = min(rank[reader] for reader in graph.successors(name)) - 1
    bottom = max(rank.values(), default=0)
    rank |= {name: bottom for name in last if not graph.out_degree(name)}
    return rank


def _links(
    edges: Sequence[tuple[str, str]], rank: dict[str, int], rows: list[list[str]]
) -> list[Link]:
    """Return the steps of all edges, and insert the dummies into the rows."""
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


def _neighbors(links: Iterable[Link]) -> tuple[defaultdict[str, list[str]], ...]:
    """Return the neighbors above and below each box and dummy."""
    above, below = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for upper, lower, *_ in links:
        below[upper].append(lower)
        above[lower].append(upper)
    return above, below


def _reorder(rows: Sequence[list[str]], neighbors: dict[str, list[str]]) -> None:
    """Sort each row by the mean position of its neighbors in the row before it, in place."""
    for before, row in itertools.pairwise(rows):
        position = {name: i for i, name in enumerate(before)}
        own = {name: i * len(before) / len(row) for i, name in enumerate(row)}
        mean = {
            name: sum(position[n] for n in near) / len(near) if near else own[name]
            for name, near in ((name, neighbors[name]) for name in row)
        }
        row.sort(key=mean.__getitem__)


def _crossings(rows: Sequence[Sequence[str]], below: dict[str, list[str]]) -> int:
    total = 0
    for row, after in itertools.pairwise(rows):
        position = {name: i for i, name in enumerate(after)}
        seen: list[int] = []
        for name in row:
            ends = sorted(position[n] for n in below[name])
            total += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
            for end in ends:
                bisect.insort(seen, end)
    return total


Point = tuple[float, float]
Size = tuple[float, float]

METRICS: dict[str, float] = {
    "pad": 14,  # inside a box, around its children
    "header": 40,
    "bareHeader": 28,  # without a caption
    "gapX": 16,
    "gapY": 14,  # between rows without edges
    "flowY": 26,  # between rows that edges connect
    "dummy": 6,  # width of the channel of an edge that passes a row
    "slack": 0.02,  # weight of a passing edge relative to a box that wants the same position
    "aspect": 1.8,  # width to height that rows without edges aim at
    "port": 14,  # at most between two arrows that end in one box
    "branch": 19,  # height of the line of an adapter on its operation
}

_CENTERING = 13


@dataclasses.dataclass(frozen=True, slots=True)
class Local:
    """The inside of a box.

    Attributes:
        width, height: Size of the box.
        spots: Upper left corners of the children.
        wires: The steps of the edges, each with four points: a straight line, a curve, and a
            straight line.
    """

    width: float
    height: float
    spots: Mapping[str, Point]
    wires: tuple[tuple[Link, tuple[Point, Point, Point, Point]], ...] = ()


def grid(sizes: Mapping[str, Size]) -> Local:
    """Arrange boxes in rows, wrapped like text, so that the result is neither long nor wide.

    A box goes below its predecessor if the row is high enough for both.
    """
    gap_x, gap_y = METRICS["gapX"], METRICS["gapY"]
    area = sum((w + gap_x) * (h + gap_y) for w, h in sizes.values())
    limit = max(math.sqrt(area * METRICS["aspect"]), *(w for w, _ in sizes.values()))
    spots: dict[str, Point] = {}
    left = top = width = 0.0  # of the row's last column, of the row, of the whole grid
    column: Size = (0.0, 0.0)
    row = 0.0  # height
    for name, (w, h) in sizes.items():
        below = column[1] + gap_y
        if column[1] and below + h <= row and left + w <= limit:
            spots[name] = (left, top + below)
            column = (max(column[0], w), below + h)
        else:
            left = left + column[0] + gap_x if column[1] else 0.0
            if left and left + w > limit:
                left, top, row = 0.0, top + row + gap_y, 0.0
            spots[name] = (left, top)
            column = (w, h)
        row = max(row, column[1])
        width = max(width, left + column[0])
    return Local(width, top + row, spots)


def flow(sizes: Mapping[str, Size], layers: Layers) -> Local:
    """Stack rows from the top, with each box as near as possible to its center with all boxes closed."""
    dummy = (METRICS["dummy"], 0.0)
    wide = {name: sizes.get(name, dummy)[0] for row in layers.rows for name in row}
    weight = {n: METRICS["slack"] if n.startswith(DUMMY) else 1.0 for n in wide}
    center: dict[str, float] = {}
    for row in layers.rows:
        _settle(row, layers.centers, weight, wide, center)
    left = min(center[name] - wide[name] / 2 for name in wide)
    width = max(center[name] + wide[name] / 2 for name in wide) - left
    spots: dict[str, Point] = {}
    bands: dict[str, Point] = {}
    y = 0.0
    for row in layers.rows:
        height = max(sizes.get(name, dummy)[1] for name in row)
        for name in row:
            bands[name] = (y, y + height)
            if name in sizes:
                w, h = sizes[name]
                spots[name] = (center[name] - left - w / 2, y + (height - h) / 2)
        y += height + METRICS["flowY"]
    wires = []
    for link, (index, count) in zip(layers.links, layers.ports, strict=True):
        upper, lower = link.upper, link.lower
        gap = min(METRICS["port"], wide[lower] / (count + 1))
        port = center[lower] - left + (index - (count - 1) / 2) * gap
        # The step that ends in a dummy also crosses the dummy's row.
        start = spots[upper][1] + sizes[upper][1] if upper in sizes else bands[upper][1]
        end = spots[lower][1] if lower in sizes else bands[lower][1]
        x = center[upper] - left
        points = ((x, start), (x, bands[upper][1]), (port, bands[lower][0]), (port, end))
        wires.append((link, points))
    return Local(width, y - METRICS["flowY"], spots, tuple(wires))


def _centers(
    rows: Sequence[Sequence[str]], links: Sequence[Link], wide: Mapping[str, float]
) -> dict[str, float]:
    above, below = _neighbors(links)
    center: dict[str, float] = {}
    for row in rows:
        _settle(row, dict.fromkeys(row, 0.0), dict.fromkeys(row, 1.0), wide, center)
    for sweep in range(_CENTERING):
        near, ordered = (below, rows[::-1]) if sweep % 2 else (above, rows)
        for row in ordered:
            wanted = {
                name: _mean(center, near[name]) if near[name] else center[name] for name in row
            }
            # Unconnected boxes stay close to the others.
            alone = {name for name in row if not above[name] and not below[name]}
            wanted |= dict.fromkeys(alone, center[row[0]])
            weight = {n: METRICS["slack"] if n.startswith(DUMMY) else 1.0 for n in row}
            weight |= dict.fromkeys(alone, 0.001)
            _settle(row, wanted, weight, wide, center)
    return {name: round(value, 1) for name, value in center.items()}


def _mean(center: Mapping[str, float], names: Sequence[str]) -> float:
    # Passing edges pull only if no boxes do, so that the main line of a graph stays straight.
    pulling = [name for name in names if not name.startswith(DUMMY)] or names
    return sum(center[name] for name in pulling) / len(pulling)


def _settle(
    row: Sequence[str],
    wanted: Mapping[str, float],
    weight: Mapping[str, float],
    wide: Mapping[str, float],
    center: dict[str, float],
) -> None:
    """Set the centers of a row as near to the wanted centers (least squares) as order and widths allow."""
    offset = 0.0
    offsets: list[float] = []
    # Blocks of boxes that touch: weighted sum of wanted positions, weight, number of boxes.
    blocks: list[tuple[float, float, int]] = []
    for i, name in enumerate(row):
        if i:
            offset += (wide[row[i - 1]] + wide[name]) / 2 + METRICS["gapX"]
        offsets.append(offset)
        block = ((wanted[name] - offset) * weight[name], weight[name], 1)
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    index = 0
    for total, mass, count in blocks:
        for _ in range(count):
            center[row[index]] = total / mass + offsets[index]
            index += 1


def _ports(links: Sequence[Link], center: Mapping[str, float]) -> tuple[tuple[int, int], ...]:
    """Return the index of each link among the links with the same lower end, and the number of these."""
    ending: dict[str, list[int]] = {}
    for index, link in enumerate(links):
        ending.setdefault(link.lower, []).append(index)
    ports = [(0, 1)] * len(links)
    for steps in ending.values():
        steps.sort(key=lambda index: center[links[index].upper])
        for position, index in enumerate(steps):
            ports[index] = (position, len(steps))
    return tuple(ports)


CHIPS: dict[Kind, str] = {
    Kind.BASE: "W",
    Kind.DROPOUT: "D",
    Kind.DOWN: "A",
    Kind.UP: "B",
    Kind.SCALE: "×",
    Kind.ADD: "+",
    Kind.ADAPTER: "L",
    Kind.SITE: "W",
}
"""The letter on the square of a box, by its function for an adapter."""

_NAME_CHAR, CAPTION_CHAR = 7.3, 6.1  # widths of a monospaced character of 12 and 10 pixels
_NAME_LIMIT, _CAPTION_LIMIT = 34, 40
_MOST_LINES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A box with its position, in the coordinates of the whole picture."""

    box: Box
    x: float
    y: float
    width: float
    height: float
    depth: int
    open: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """A step of an edge; see :class:`~lora_fx.tools.draw.layout.Local` for the points."""

    link: Link
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A picture with coordinates, parents before children."""

    boxes: tuple[Placed, ...]
    wires: tuple[Wire, ...]
    width: float
    height: float


def words_of(box: Box) -> tuple[str, str]:
    """Return name and caption as written: without characters that XML forbids, elided in the middle."""
    # The name of a box for several modules ends with their number, so it may be longer.
    limit = _NAME_LIMIT + 14 if box.repeats else _NAME_LIMIT
    return elide(clean(box.name), limit), elide(clean(box.caption), _CAPTION_LIMIT)


def count_of(box: Box) -> str:
    """Return the number of sites inside, as written on a box: ``2 of 7 adapted``.

    Equal boxes have ``2 of 7 adapted in each``. If the number of linear operations is unknown, it is ``2``,
    or ``32 × 2`` for 32 equal boxes.
    """
    if not box.children or not (box.sites or box.is_bare):
        return ""
    count = len(box.repeats)
    if not box.linear:
        return f"{count} × {box.sites // count}" if count else str(box.sites)
    each = max(count, 1)
    words = f"{box.sites // each} of {max(box.linear, box.sites) // each} adapted"
    return f"{words} in each" if count else words


def lines_of(box: Box) -> tuple[Branch, ...]:
    """Return the adapters that are written on a closed box, or none if there are too many."""
    return box.branches if len(box.branches) <= _MOST_LINES else ()


def mark_width(mark: str) -> int:
    """Return the width of a mark, a word in a frame."""
    return math.ceil(5.6 * len(mark)) + 10


def sizes_of(box: Box) -> tuple[float, float]:
    """Return width and height of a box that is closed or has no children."""
    name, caption = words_of(box)
    marks = sum(mark_width(clean(mark)) + 5 for mark in box.marks)
    text = max(len(name) * _NAME_CHAR, len(caption) * CAPTION_CHAR + marks)
    # A box with children has a triangle before its name and a count of sites after it.
    count = count_of(box)
    extra = (16 + (16 + 7 * len(count) if count else 0)) if box.children else 0
    before = 24 if box.kind in CHIPS else 0
    lines = lines_of(box)
    words = max((len(clean(line.words)) * CAPTION_CHAR + 40 for line in lines), default=0)
    height = (38 if caption or marks else 26) + METRICS["branch"] * len(lines)
    return max(math.ceil(text) + before + extra + 22, math.ceil(words) + 20), height


def plan_layers(picture: Picture) -> dict[str, Layers]:
    """Arrange the children of boxes in rows, if the children form a graph.

    Returns:
        The rows of each such box, by the id of the box.
    """
    layers: dict[str, Layers] = {}
    for box in picture.root.walk():
        if box.flow and box.children:
            ids = [child.id for child in box.children]
            tops = [child.id for child in box.children if child.kind is Kind.INPUT]
            ends = [child.id for child in box.children if child.kind is Kind.OUTPUT]
            widths = {child.id: sizes_of(child)[0] for child in box.children}
            layers[box.id] = layers_of(ids, box.edges, tops, ends, widths)
    return layers


def place(
    picture: Picture,
    layers: Mapping[str, Layers],
    is_open: Callable[[Box], bool] = lambda box: True,
) -> Scene:
    """Lay out a picture.

    Args:
        picture: The picture.
        layers: Result of :func:`plan_layers`.
        is_open: Returns True if a box shows its children.
    """
    inside: dict[str, Local] = {}

    def measure(box: Box) -> tuple[float, float]:
        if not box.children or not is_open(box):
            return sizes_of(box)
        sizes = {child.id: measure(child) for child in box.children}
        local = flow(sizes, layers[box.id]) if box.id in layers else grid(sizes)
        width = max(local.width + 2 * METRICS["pad"], sizes_of(box)[0])
        header = METRICS["header" if words_of(box)[1] else "bareHeader"]
        height = local.height + header + METRICS["pad"]
        inside[box.id] = dataclasses.replace(local, width=width, height=height)
        offsets[box.id] = ((width - local.width) / 2, header)
        return width, height

    def settle(box: Box, x: float, y: float, depth: int) -> None:
        local = inside.get(box.id)
        if local is None:
            boxes.append(Placed(box, x, y, *sizes_of(box), depth, open=False))
            return
        boxes.append(Placed(box, x, y, local.width, local.height, depth, open=True))
        dx, dy = x + offsets[box.id][0], y + offsets[box.id][1]
        for link, points in local.wires:
            wires.append(Wire(link, tuple((px + dx, py + dy) for px, py in points)))
        for child in box.children:
            left, top = local.spots[child.id]
            settle(child, left + dx, top + dy, depth + 1)

    offsets: dict[str, Point] = {}
    boxes: list[Placed] = []
    wires: list[Wire] = []
    width, height = measure(picture.root)
    settle(picture.root, 0.0, 0.0, 0)
    return Scene(tuple(boxes), tuple(wires), width, height)
