"""A picture as one SVG file: everything open, hovering shows the facts, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from xml.sax.saxutils import escape, quoteattr

from lora_fx.tools.draw.layout import CHIPS, Placed, Point, Scene, place, plan_layers, words_of
from lora_fx.tools.draw.picture import Box, Kind, Picture, clean, elide

__all__ = ["classes_of", "to_svg"]

_MARGIN = 24
_TOP = 84
_LEGEND_Y = 62


def to_svg(picture: Picture) -> str:
    """The text of an SVG file."""
    scene = place(picture, plan_layers(picture))
    # The legend of what occurs in the picture is above it, and may be wider.
    legend, legend_width = _legend(picture)
    width = max(scene.width, legend_width, 520) + 2 * _MARGIN
    height = scene.height + _TOP + _MARGIN
    shift = (width - scene.width) / 2
    style = (resources.files("lora_fx.tools") / "viewer" / "picture.css").read_text("utf-8")
    title = clean(picture.title)
    summary = " · ".join(f"{label} {value}" for label, value in picture.facts)
    size = f'width="{_n(width)}" height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" {size}>',
        f"<title>{escape(title)}</title>",
        f"<style>{escape(style)}</style>",
        f'<text class="title" x="{_MARGIN}" y="32">{escape(elide(title, 60))}</text>',
        f'<text class="subtitle" x="{_MARGIN}" y="50">{escape(clean(summary))}</text>',
        *legend,
        f'<g transform="translate({_n(shift)} {_TOP})">',
        *_drawing(picture, scene),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def classes_of(box: Box, is_open: bool, depth: int) -> str:
    """The style classes of a box."""
    classes = ["box", str(box.kind)]
    if is_open:
        classes += ["open", "odd"] if depth % 2 else ["open"]
    if box.children and box.sites:
        classes.append("adapted")
    return " ".join(classes)


def _drawing(picture: Picture, scene: Scene) -> Iterator[str]:
    for placed in scene.boxes:
        yield from _box(placed)
    by_id = {box.id: box for box in picture.root.walk()}
    for wire in scene.wires:
        source, target = by_id[wire.link.source], by_id[wire.link.target]
        lora = " lora" if target.adapter and source.kind is not Kind.BASE else ""
        yield f'<path class="wire{lora}" d="{_path(wire.points)}"/>'
        if wire.link.lower == target.id:
            x, y = wire.points[-1]
            yield f'<path class="arrow{lora}" d="M{_n(x)} {_n(y)}l-3.5 -6h7z"/>'


def _box(placed: Placed) -> Iterator[str]:
    box = placed.box
    name, caption = words_of(box)
    width, height = placed.width, placed.height
    yield (
        f'<g class="{classes_of(box, placed.open, placed.depth)}" id="{box.id}" '
        f"data-fqn={quoteattr(clean(box.fqn))} data-adapter={quoteattr(clean(box.adapter))} "
        f'data-count="{max(len(box.repeats), 1)}" '
        f'transform="translate({_n(placed.x)} {_n(placed.y)})">'
    )
    yield f"<title>{escape(clean(box.hover))}</title>"
    size = f'width="{_n(width)}" height="{_n(height)}" rx="{_radius(box)}"'
    if box.repeats:
        yield f'<rect class="shade" x="7" y="-7" {size}/>'
        yield f'<rect class="shade" x="3.5" y="-3.5" {size}/>'
    yield f'<rect class="frame" {size}/>'
    left = 11
    if box.kind in CHIPS:
        middle = height / 2
        yield f'<rect class="chip" x="7" y="{_n(middle - 9)}" width="18" height="18" rx="4"/>'
        letter = CHIPS[box.kind]
        yield f'<text class="chip-letter" x="16" y="{_n(middle + 4)}">{letter}</text>'
        left = 32
    if not placed.open and not caption:
        yield f'<text class="name" x="{left}" y="{_n(height / 2 + 4)}">{escape(name)}</text>'
    else:
        yield f'<text class="name" x="{left}" y="16">{escape(name)}</text>'
        yield f'<text class="caption" x="{left}" y="30">{escape(caption)}</text>'
    if box.children and box.sites:
        wide = 10 + 7 * len(str(box.sites))
        x = width - wide - 7
        yield f'<rect class="badge" x="{_n(x)}" y="6" width="{wide}" height="14" rx="7"/>'
        yield f'<text class="badge-text" x="{_n(x + wide / 2)}" y="16.5">{box.sites}</text>'
    yield "</g>"


def _legend(picture: Picture) -> tuple[list[str], float]:
    x = float(_MARGIN)
    lines: list[str] = []
    for kind, text in picture.legend:
        lines.append(f'<g class="{kind}" transform="translate({_n(x)} {_LEGEND_Y})">')
        lines.append('<rect class="frame" width="14" height="14" rx="4"/>')
        if kind in CHIPS:
            lines.append('<rect class="chip" width="14" height="14" rx="4"/>')
            lines.append(f'<text class="chip-letter" x="7" y="11">{CHIPS[kind]}</text>')
        lines.append(f'<text class="legend" x="20" y="11">{escape(text)}</text></g>')
        x += 20 + 6.6 * len(text) + 18
    return lines, x - _MARGIN


def _radius(box: Box) -> int:
    return 13 if box.kind in (Kind.INPUT, Kind.OUTPUT) else 7


def _path(points: tuple[Point, ...]) -> str:
    (x, y0), (_, y1), (u, y2), (_, y3) = points
    middle = _n((y1 + y2) / 2)
    left, right = _n(x), _n(u)
    curve = f"C{left} {middle} {right} {middle} {right} {_n(y2)}"
    return f"M{left} {_n(y0)}V{_n(y1)}{curve}V{_n(y3)}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
