"""Places the boxes of a picture: sizes, coordinates and the ways of edges, in pixels.

The HTML page does the same in the browser, where boxes open and close, with the sizes of closed
boxes and the rows of :mod:`lora_fx.tools.draw.layering` from here; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from lora_fx.tools.draw.coordinates import METRICS, Local, Point, flow, grid
from lora_fx.tools.draw.layering import Layers, Link, layers_of
from lora_fx.tools.draw.picture import Box, Kind, Picture, clean, elide

__all__ = ["CHIPS", "Placed", "Scene", "Wire", "place", "plan_layers", "sizes_of", "words_of"]

CHIPS: dict[Kind, str] = {
    Kind.BASE: "W",
    Kind.DROPOUT: "D",
    Kind.DOWN: "A",
    Kind.UP: "B",
    Kind.SCALE: "×",
    Kind.ADD: "+",
    Kind.ADAPTER: "L",
}
"""The letter on a coloured square that marks what belongs to an adapter."""

_NAME_CHAR, _CAPTION_CHAR = 7.3, 6.1  # widths of a monospaced character of 12 and 10 pixels
_NAME_LIMIT, _CAPTION_LIMIT = 34, 40


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A box at its place, in the coordinates of the whole picture."""

    box: Box
    x: float
    y: float
    width: float
    height: float
    depth: int
    open: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """A step of an edge; see :class:`~lora_fx.tools.draw.coordinates.Local` for the points."""

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
    """Name and caption as they are written: without what XML refuses, elided in the middle."""
    # The name of a fold says at its end how many it stands for: it is worth its width.
    limit = _NAME_LIMIT + 14 if box.repeats else _NAME_LIMIT
    return elide(clean(box.name), limit), elide(clean(box.caption), _CAPTION_LIMIT)


def sizes_of(box: Box) -> tuple[float, float]:
    """Width and height of a box that is closed, or has nothing inside."""
    name, caption = words_of(box)
    chip = 24 if box.kind in CHIPS else 0
    text = max(len(name) * _NAME_CHAR, len(caption) * _CAPTION_CHAR)
    # A box that opens has a triangle before its name and a count of sites after it.
    extra = (16 + (16 + 7 * len(str(box.sites)) if box.sites else 0)) if box.children else 0
    return math.ceil(text) + chip + extra + 22, 38 if caption else 26


def plan_layers(picture: Picture) -> dict[str, Layers]:
    """The rows of every box whose children are a graph, by id."""
    found: dict[str, Layers] = {}
    for box in picture.root.walk():
        if box.flow and box.children:
            ids = [child.id for child in box.children]
            tops = [child.id for child in box.children if child.kind is Kind.INPUT]
            ends = [child.id for child in box.children if child.kind is Kind.OUTPUT]
            found[box.id] = layers_of(ids, box.edges, tops, ends)
    return found


def place(
    picture: Picture,
    layers: Mapping[str, Layers],
    is_open: Callable[[Box], bool] = lambda box: True,
) -> Scene:
    """Lays a picture out.

    Args:
        picture: The picture.
        layers: What :func:`plan_layers` made of it.
        is_open: Whether a box shows what is inside.
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
