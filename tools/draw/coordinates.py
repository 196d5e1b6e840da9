"""Coordinates inside one box: rows of a layered graph, or a grid of what only stands in order.

``viewer/viewer.js`` has the same functions under the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lora_fx.tools.draw.layering import DUMMY, Layers, Link

__all__ = ["METRICS", "Local", "Point", "flow", "grid"]

Point = tuple[float, float]
Size = tuple[float, float]

METRICS: dict[str, float] = {
    "pad": 14,  # inside a box, around its children
    "header": 40,
    "bareHeader": 28,  # without a caption
    "gapX": 16,
    "gapY": 14,  # between the rows of a grid
    "flowY": 26,  # between rows that edges connect
    "dummy": 6,  # width of the channel of an edge that passes a row
    "slack": 0.02,  # how little a passing edge resists where it and a box want the same place
    "sweeps": 13,
    "aspect": 1.8,  # width to height that a grid aims at
    "port": 14,  # at most between two arrows that end in one box
}


@dataclasses.dataclass(frozen=True, slots=True)
class Local:
    """The inside of a box.

    Attributes:
        width, height: Its size.
        spots: Left upper corners of the children.
        wires: The steps of the edges, each with four points: a straight line, a curve, and a
            straight line.
    """

    width: float
    height: float
    spots: Mapping[str, Point]
    wires: tuple[tuple[Link, tuple[Point, Point, Point, Point]], ...] = ()


def grid(sizes: Mapping[str, Size]) -> Local:
    """Rows from left to right, as in a text, wrapped so that the whole is neither long nor wide."""
    widths = [w for w, _ in sizes.values()]
    limits = [sum(widths[: i + 1]) + i * METRICS["gapX"] for i in range(len(widths))]
    packed = (_pack(sizes, max(limit, *widths)) for limit in limits)
    aspect = METRICS["aspect"]
    return min(packed, key=lambda local: max(local.width, local.height * aspect))


def _pack(sizes: Mapping[str, Size], limit: float) -> Local:
    """Rows of columns: what fits below its predecessor, in a row of taller ones, goes there."""
    gap_x, gap_y = METRICS["gapX"], METRICS["gapY"]
    spots: dict[str, Point] = {}
    left = top = width = 0.0  # of the row's last column, of the row, of everything
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
    """Rows from the top, each box near the middle of what it is connected to."""
    dummy = (METRICS["dummy"], 0.0)
    wide = {name: sizes.get(name, dummy)[0] for row in layers.rows for name in row}
    centre = _centres(layers, wide)
    left = min(centre[name] - wide[name] / 2 for name in wide)
    width = max(centre[name] + wide[name] / 2 for name in wide) - left
    spots: dict[str, Point] = {}
    bands: dict[str, Point] = {}
    y = 0.0
    for row in layers.rows:
        height = max(sizes.get(name, dummy)[1] for name in row)
        for name in row:
            bands[name] = (y, y + height)
            if name in sizes:
                w, h = sizes[name]
                spots[name] = (centre[name] - left - w / 2, y + (height - h) / 2)
        y += height + METRICS["flowY"]
    middle = {name: centre[name] - left for name in wide}
    ports = _ports(layers, middle, wide)
    wires = []
    for link, port in zip(layers.links, ports, strict=True):
        upper, lower = link.upper, link.lower
        # Through a dummy leads the step that ends in it.
        start = spots[upper][1] + sizes[upper][1] if upper in sizes else bands[upper][1]
        end = spots[lower][1] if lower in sizes else bands[lower][1]
        x = middle[upper]
        points = ((x, start), (x, bands[upper][1]), (port, bands[lower][0]), (port, end))
        wires.append((link, points))
    return Local(width, y - METRICS["flowY"], spots, tuple(wires))


def _centres(layers: Layers, wide: Mapping[str, float]) -> dict[str, float]:
    above: dict[str, list[str]] = {name: [] for name in wide}
    below: dict[str, list[str]] = {name: [] for name in wide}
    for upper, lower, *_ in layers.links:
        below[upper].append(lower)
        above[lower].append(upper)
    centre: dict[str, float] = {}
    for row in layers.rows:
        _settle(row, dict.fromkeys(row, 0.0), dict.fromkeys(row, 1.0), wide, centre)
    for sweep in range(int(METRICS["sweeps"])):
        near, rows = (below, layers.rows[::-1]) if sweep % 2 else (above, layers.rows)
        for row in rows:
            wanted = {
                name: _mean(centre, near[name]) if near[name] else centre[name] for name in row
            }
            # What is connected to nothing stands close to the rest.
            alone = {name for name in row if not above[name] and not below[name]}
            wanted |= dict.fromkeys(alone, centre[row[0]])
            weight = {n: METRICS["slack"] if n.startswith(DUMMY) else 1.0 for n in row}
            weight |= dict.fromkeys(alone, 0.001)
            _settle(row, wanted, weight, wide, centre)
    return centre


def _mean(centre: Mapping[str, float], names: Sequence[str]) -> float:
    # Edges that only pass do not pull where boxes do: the main line of a graph stays straight.
    pulling = [name for name in names if not name.startswith(DUMMY)] or names
    return sum(centre[name] for name in pulling) / len(pulling)


def _settle(
    row: Sequence[str],
    wanted: Mapping[str, float],
    weight: Mapping[str, float],
    wide: Mapping[str, float],
    centre: dict[str, float],
) -> None:
    """Puts a row where it wants to be, as nearly (least squares) as order and widths allow."""
    offset = 0.0
    offsets: list[float] = []
    # Blocks of boxes that touch: weighted sum of wishes, weight, number of boxes.
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
            centre[row[index]] = total / mass + offsets[index]
            index += 1


def _ports(layers: Layers, middle: Mapping[str, float], wide: Mapping[str, float]) -> list[float]:
    """Where on the upper side of a box each step ends: side by side, in order of origin."""
    ending: dict[str, list[int]] = {}
    for index, link in enumerate(layers.links):
        ending.setdefault(link.lower, []).append(index)
    ports = [0.0] * len(layers.links)
    for lower, steps in ending.items():
        steps.sort(key=lambda index: middle[layers.links[index].upper])
        gap = min(METRICS["port"], wide[lower] / (len(steps) + 1))
        for i, index in enumerate(steps):
            ports[index] = middle[lower] + (i - (len(steps) - 1) / 2) * gap
    return ports
