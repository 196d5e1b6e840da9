"""Pictures of models and plans, for looking at and for other programs."""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import networkx as nx
from torch import nn

from lora_fx.api import capture
from lora_fx.errors import CaptureError, ConfigError, LoraFxError
from lora_fx.files import output_file, replacing
from lora_fx.ir import Capture, Plan
from lora_fx.passes.graph import graphs_of
from lora_fx.tools.draw.layout import (
    CHIPS,
    METRICS,
    Placed,
    Point,
    Scene,
    place,
    plan_layers,
    sizes_of,
    words_of,
)
from lora_fx.tools.draw.painting import picture_of_model, picture_of_plan
from lora_fx.tools.draw.picture import Box, Kind, Picture, clean, elide

__all__ = ["FORMATS", "visualize"]


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
    style = _asset("picture.css")
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


_PLAIN = ("#ffffff", "#cbd2df")
_RULE = re.compile(
    r"^(?P<selectors>.*) { fill: (?P<fill>#\w+); stroke: (?P<line>#\w+)", re.MULTILINE
)


@functools.cache
def _colors() -> dict[str, tuple[str, str]]:
    """Fill and line of each kind, as the light part of the style sheet has them."""
    light = _asset("picture.css").partition("@media")[0]
    return {
        kind: (rule["fill"], rule["line"])
        for rule in _RULE.finditer(light)
        for kind in re.findall(r"\.(\w+) > \.frame", rule["selectors"])
    }


def to_dot(picture: Picture) -> str:
    """The text of a DOT file."""
    boxes = {box.id: box for box in picture.root.walk()}
    lines = [
        f"digraph {_quote(picture.title)} {{",
        '  graph [compound=true, fontname="Helvetica", fontsize=12, ranksep=0.35];',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];',
        '  edge [color="#9aa5b9", arrowsize=0.6];',
        *_dot_box(picture.root, "  "),
    ]
    for box in boxes.values():
        for source, target in box.edges:
            lines.append("  " + _dot_edge(boxes[source], boxes[target]))
    lines.append("}")
    return "\n".join(lines) + "\n"


def _dot_box(box: Box, indent: str) -> Iterator[str]:
    name, caption = words_of(box)
    label = _quote(f"{name}\n{caption}" if caption else name)
    if not box.children:
        fill, line = _colors().get(box.kind, _PLAIN)
        colors = f'fillcolor="{fill}", color="{line}"'
        yield f"{indent}{box.id} [label={label}, {colors}, tooltip={_quote(box.hover)}];"
        return
    yield f"{indent}subgraph cluster_{box.id} {{"
    style = "rounded,dashed" if box.kind is Kind.OPAQUE else "rounded"
    color = "#23a894" if box.sites else "#cbd2df"
    yield f'{indent}  graph [label={label}, style="{style}", color="{color}"];'
    for child in box.children:
        yield from _dot_box(child, indent + "  ")
    yield f"{indent}}}"


def _dot_edge(source: Box, target: Box) -> str:
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


_VISIBLE = 130
"""About as many boxes as a screen shows with names that can be read."""

_MODULES = frozenset({Kind.LEAF, Kind.CALL, Kind.SITE, Kind.SKIPPED, Kind.REJECTED})


def to_html(picture: Picture) -> str:
    """The text of an HTML file."""
    # Escaped so that nothing in it can end the script element: </script>, <!--, ]]>.
    data = json.dumps(document_of(picture), ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": _text(picture.title),
        "style": _asset("picture.css") + _asset("page.css"),
        "summary": "".join(
            f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
            for label, value in picture.facts
        ),
        "legend": _html_legend(picture),
        "data": data,
        "script": _asset("layout.js") + _asset("viewer.js"),
    }
    # In one go: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def document_of(picture: Picture) -> dict[str, Any]:
    """:meth:`Picture.to_dict` and what the page needs to draw it."""
    document = picture.to_dict()
    layers = plan_layers(picture)
    opened = initially_open(picture.root)
    boxes = {box.id: box for box in picture.root.walk()}
    for entry in (*document["boxes"], *document["nodes"]):
        box = boxes[entry["id"]]
        entry["words"] = words_of(box)
        entry["size"] = sizes_of(box)
    for entry in document["boxes"]:
        known = layers.get(entry["id"])
        entry["open"] = entry["id"] in opened
        entry["layers"] = known and {"rows": known.rows, "links": known.links}
    # The links of the layers say it already.
    del document["edges"]
    return document | {
        "metrics": METRICS,
        "chips": {str(kind): letter for kind, letter in CHIPS.items()},
    }


def initially_open(root: Box) -> set[str]:
    """Which boxes are open at first: as many levels as a screen holds, and one adapter at least."""
    opened: set[str] = set()
    visible = 1
    level = [root] if root.children else []
    while level:
        # A level opens as a whole, so that equal things look equal; what is inside a norm or an
        # activation is not the first thing to look at.
        adapted = [box for box in level if box.sites]
        others = [box for box in level if not box.sites and any(map(_is_module, box.children))]
        for group in (adapted, others):
            added = sum(len(box.children) for box in group)
            if visible + added <= _VISIBLE or root in group:
                visible += added
                opened.update(box.id for box in group)
        level = [c for box in level if box.id in opened for c in box.children if c.children]
    box = root
    while inner := next((c for c in box.children if c.sites and c.children), None):
        opened.update((box.id, inner.id))
        box = inner
    return opened


def _html_legend(picture: Picture) -> str:
    items = []
    for kind, text in picture.legend:
        letter = CHIPS.get(kind)
        inner = '<rect class="frame" x=".5" y=".5" width="14" height="14" rx="4"/>'
        if letter:
            inner = (
                '<rect class="chip" width="15" height="15" rx="4"/>'
                f'<text class="chip-letter" x="7.5" y="11.5">{letter}</text>'
            )
        items.append(f'<span><svg><g class="{kind}">{inner}</g></svg>{_text(text)}</span>')
    notes = [f'<span class="note">{_text(note)}</span>' for note in picture.notes]
    return "".join(items + notes)


def _is_module(box: Box) -> bool:
    return bool(box.children) or box.kind in _MODULES


def _asset(name: str) -> str:
    return (resources.files("lora_fx.tools.draw") / "viewer" / name).read_text("utf-8")


def _text(text: str) -> str:
    return escape(clean(text), {'"': "&quot;"})


def _to_json(picture: Picture) -> str:
    return json.dumps(picture.to_dict(), indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Picture], str]] = {
    ".svg": to_svg,
    ".dot": to_dot,
    ".graphml": to_graphml,
    ".json": _to_json,
    ".html": to_html,
}
"""Writers by suffix."""


def visualize(
    model_or_plan: nn.Module | Capture | Plan, path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Draws a model or a plan into a file, in the format that the suffix names.

    Modules are nested boxes, those with a graph show its nodes; equal blocks in sequence are drawn
    once, with their number. ``.svg`` and ``.html`` are for looking at: the page opens and closes
    boxes, searches and zooms, and needs no network. ``.dot`` is for Graphviz, ``.graphml`` for
    networkx, Gephi and yEd, ``.json`` for programs of your own: ``boxes`` (with children),
    ``nodes`` (without) and ``edges``, each box and node with its ``parent``; see
    :meth:`lora_fx.tools.draw.picture.Picture.to_dict`. The same model gives the same bytes.

    Args:
        model_or_plan: Any module (plain, captured, rewritten or merged), a capture, or a plan: then
            the sites by name, and beside them what is not adapted and why.
        path: The file to write.
        force: Whether to write over a file that exists.

    Returns:
        The path of the file.

    Raises:
        ConfigError: The suffix is none of these, the folder does not exist, or the file does.
        LoraFxError: The file could not be written; one that was there is still there.
    """
    if isinstance(path, nn.Module):
        raise ConfigError(
            f"path is a {type(path).__name__}: give the model first, then a file name"
        )
    target = output_file(path, tuple(FORMATS), ConfigError)
    write = FORMATS[target.suffix.lower()]
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: there is no folder {target.parent}; create it")
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists: pass force=True to write over it, or choose another name"
        )
    _replace(target, write(picture_of(model_or_plan)))
    return target


def picture_of(model_or_plan: object) -> Picture:
    """What :func:`visualize` draws, before it is a file."""
    if isinstance(model_or_plan, Plan):
        return picture_of_plan(model_or_plan)
    if isinstance(model_or_plan, Capture):
        graphs = {name: region.graph for name, region in model_or_plan.regions.items()}
        return picture_of_model(model_or_plan.model, graphs)
    if isinstance(model_or_plan, nn.Module):
        graphs = graphs_of(model_or_plan)
        return picture_of_model(model_or_plan, graphs) if graphs else _plain(model_or_plan)
    found = type(model_or_plan).__name__
    raise ConfigError(f"cannot draw a {found}: give an nn.Module, or what lora_fx.plan() returns")


def _plain(model: nn.Module) -> Picture:
    """Captures a model for the picture alone."""
    try:
        captured = capture(model)
    except CaptureError as error:
        return picture_of_model(model, {}, (f"no graphs: {error}",))
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    # The copy is frozen; its parameters are its own, only their storage is shared.
    for name, parameter in captured.model.named_parameters():
        if trains.get(name, False):
            parameter.requires_grad_(True)
    return picture_of(captured)


def _replace(target: Path, text: str) -> None:
    try:
        with replacing(target) as new:
            new.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise LoraFxError(f"could not write {target}: {error}") from error
