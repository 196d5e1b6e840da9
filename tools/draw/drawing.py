"""Pictures of models and plans, for viewing and for other programs."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

import networkx as nx
from torch import nn

from lora_fx.api import capture
from lora_fx.config import CONFIG_NAME
from lora_fx.errors import CaptureError, ConfigError, LoraFxError, hint
from lora_fx.export.report import ExportReport
from lora_fx.export.session import OnnxSession
from lora_fx.extraction import ExtractionReport
from lora_fx.files import current, output_file, replacing
from lora_fx.ir import Capture, Plan, record_of
from lora_fx.passes.graph import graphs_of
from lora_fx.passes.merge import MergeReport
from lora_fx.passes.pipeline import find_operations
from lora_fx.tools.draw.layout import (
    CAPTION_CHAR,
    CHIPS,
    METRICS,
    Placed,
    Point,
    Scene,
    count_of,
    lines_of,
    mark_width,
    place,
    plan_layers,
    words_of,
)
from lora_fx.tools.draw.names import (
    picture_of_extraction,
    picture_of_folder,
    picture_of_merge,
    picture_of_plan,
)
from lora_fx.tools.draw.page import asset, classes_of, to_html
from lora_fx.tools.draw.painting import picture_of_file, picture_of_model
from lora_fx.tools.draw.picture import Box, Kind, Picture, State, clean, elide, end_of

__all__ = ["FORMATS", "explorer_data", "explorer_graph", "visualize"]

_MARGIN = 24
_NARROWEST = 520
_LEGEND_Y = 62
_LEGEND_ROW = 22
_SUBTITLE_ROW = 16


def to_svg(picture: Picture) -> str:
    """Return the text of an SVG file."""
    scene = place(picture, plan_layers(picture))
    inner = max(scene.width, _NARROWEST)
    subtitle = _subtitle(picture, inner)
    legend, top = _legend(picture, inner, _LEGEND_Y + _SUBTITLE_ROW * (len(subtitle) - 1))
    width, height = inner + 2 * _MARGIN, scene.height + top + _MARGIN
    shift = (width - scene.width) / 2
    style = asset("picture.css")
    title = clean(picture.title)
    size = f'width="{_n(width)}" height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" {size}>',
        f"<title>{escape(title)}</title>",
        f"<style>{escape(style)}</style>",
        f'<text class="title" x="{_MARGIN}" y="32">{escape(elide(title, 60))}</text>',
        *(
            f'<text class="subtitle" x="{_MARGIN}" y="{50 + _SUBTITLE_ROW * row}">{escape(text)}</text>'
            for row, text in enumerate(subtitle)
        ),
        *legend,
        f'<g transform="translate({_n(shift)} {_n(top)})">',
        *_drawing(picture, scene),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _drawing(picture: Picture, scene: Scene) -> Iterator[str]:
    for placed in scene.boxes:
        yield from _box(placed, picture.adapters)
    by_id = {box.id: box for box in picture.root.walk()}
    for wire in scene.wires:
        source, target = by_id[wire.link.source], by_id[wire.link.target]
        kind = " lora" if is_lora(source, target) else ""
        yield f'<path class="wire{kind}" d="{_path(wire.points)}"/>'
        if wire.link.lower == target.id:
            x, y = wire.points[-1]
            yield f'<path class="arrow{kind}" d="M{_n(x)} {_n(y)}l-3.5 -6h7z"/>'


def is_lora(source: Box, target: Box) -> bool:
    """Return True if an edge is part of an adapter's branch."""
    return (
        bool(target.adapter)
        and Kind.SITE not in (source.kind, target.kind)
        and (source.kind is not Kind.BASE)
    )


def _box(placed: Placed, adapters: tuple[str, ...]) -> Iterator[str]:
    box = placed.box
    name, caption = words_of(box)
    width, height = placed.width, placed.height
    classes = classes_of(box, is_open=placed.open, depth=placed.depth, adapters=adapters)
    yield (
        f'<g class="{classes}" id="{box.id}" '
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
    if box.state is State.REFUSED:
        yield f'<path class="hatch" d="{hatch(width, height)}"/>'
    if box.state in (State.FULL, State.ROWS):
        yield (
            f'<rect class="inner" x="3" y="3" width="{_n(width - 6)}" '
            f'height="{_n(height - 6)}" rx="5"/>'
        )
    lines = () if placed.open else lines_of(box)
    head = height - METRICS["branch"] * len(lines)
    left = 11
    if box.kind in CHIPS:
        yield f'<rect class="chip" x="7" y="{_n(head / 2 - 9)}" width="18" height="18" rx="4"/>'
        letter = CHIPS[box.kind]
        yield f'<text class="chip-letter" x="16" y="{_n(head / 2 + 4)}">{letter}</text>'
        left = 32
    if not placed.open and not caption and not box.marks:
        yield f'<text class="name" x="{left}" y="{_n(head / 2 + 4)}">{escape(name)}</text>'
    else:
        yield f'<text class="name" x="{left}" y="16">{escape(name)}</text>'
        yield f'<text class="caption" x="{left}" y="30">{escape(caption)}</text>'
    x = left + len(caption) * CAPTION_CHAR + (5 if caption else 0)
    for mark in map(clean, box.marks):
        wide = mark_width(mark)
        yield f'<rect class="mark" x="{_n(x)}" y="20" width="{wide}" height="13" rx="3"/>'
        yield f'<text class="mark-text" x="{_n(x + wide / 2)}" y="29.5">{escape(mark)}</text>'
        x += wide + 5
    for index, line in enumerate(lines):
        color = f"a{adapters.index(line.adapter) % 6}" if line.adapter in adapters else "a0"
        off = "" if line.active else " off"
        y = head + METRICS["branch"] * index
        yield f'<g class="{color}{off}" transform="translate(9 {_n(y)})">'
        yield '<text class="plus" x="1" y="11">+</text>'
        yield '<rect class="factor" x="11" y="1" width="5" height="13"/>'
        yield '<rect class="factor" x="19" y="5" width="13" height="5"/>'
        yield f'<text class="caption" x="37" y="11">{escape(clean(line.words))}</text></g>'
    if count := count_of(box):
        wide = 10 + 7 * len(count)
        x = width - wide - 7
        look = "badge some" if box.is_partial else "badge"
        yield f'<rect class="{look}" x="{_n(x)}" y="6" width="{wide}" height="14" rx="7"/>'
        yield f'<text class="badge-text" x="{_n(x + wide / 2)}" y="16.5">{count}</text>'
    yield "</g>"


def hatch(width: float, height: float) -> str:
    """Return slanted lines over a box, which mark refused operations without color."""
    segments = []
    for start in range(0, int(width + height), 9):
        x0, y0 = (start, 0.0) if start <= width else (width, start - width)
        x1, y1 = (start - height, height) if start >= height else (0.0, float(start))
        segments.append(f"M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}")
    return "".join(segments)


def _subtitle(picture: Picture, width: float) -> list[str]:
    """Return the facts of a picture in lines of a width."""
    lines = [""]
    for label, value in picture.facts:
        words = clean(f"{label} {value}")
        longer = f"{lines[-1]} · {words}" if lines[-1] else words
        if lines[-1] and 6.4 * len(longer) > width:
            lines.append(words)
        else:
            lines[-1] = longer
    return lines


def _legend(picture: Picture, width: float, top: float) -> tuple[list[str], float]:
    """Return the legend from a position on, in rows of a width, and the position below it."""
    several = picture.adapters if len(picture.adapters) > 1 else ()
    entries = [(sign.look, sign.text) for sign in picture.legend]
    entries += [(f"line a{index % 6}", clean(name)) for index, name in enumerate(several)]
    x, y = float(_MARGIN), top
    lines: list[str] = []
    for look, text in entries:
        wide = 26 + 6.6 * len(text)
        if x > _MARGIN and x + wide > width + _MARGIN:
            x, y = float(_MARGIN), y + _LEGEND_ROW
        lines.append(f'<g transform="translate({_n(x)} {_n(y)})">{_sample(look)}')
        lines.append(f'<text class="legend" x="26" y="11">{escape(text)}</text></g>')
        x += wide + 18
    return lines, y + _LEGEND_ROW if lines else top


_COUNTS = {"": "2", "is-all": "2/2", "is-some": "1/2", "is-none": "0/2"}
"""Words on the samples of counts, by style."""


def _sample(look: str) -> str:
    """Return a sample of a sign in the legend, 20 wide and 14 high. The page draws the same samples."""
    kind, _, style = look.partition(" ")
    box = '<rect class="frame" width="14" height="14" rx="4"/>'
    if kind == "line":
        wide = '<rect class="factor" x="8" y="4" width="12" height="5"/>'
        return f'<g class="{style or "a0"}"><rect class="factor" width="5" height="13"/>{wide}</g>'
    if kind == "count":
        words = _COUNTS[style]
        some = " some" if style == "is-some" else ""
        badge = f'<rect class="badge{some}" width="20" height="14" rx="7"/>'
        bare = ' class="bare"' if style == "is-none" else ""
        return f'<g{bare}>{badge}<text class="badge-text" x="10" y="10.5">{words}</text></g>'
    if kind == "repeats":
        behind = '<rect class="shade" x="5" width="13" height="11" rx="3"/>'
        return f'<g>{behind}<rect class="frame" y="3" width="13" height="11" rx="3"/></g>'
    if kind in CHIPS:
        box += '<rect class="chip" width="14" height="14" rx="4"/>'
        box += f'<text class="chip-letter" x="7" y="11">{CHIPS[Kind(kind)]}</text>'
    if style == "is-refused":
        box += f'<path class="hatch" d="{hatch(14, 14)}"/>'
    if style in ("is-full", "is-rows"):
        box += '<rect class="inner" x="3" y="3" width="8" height="8" rx="2"/>'
    return f'<g class="{look}">{box}</g>'


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
    """Return fill and line color of each kind, from the light part of the style sheet."""
    light = asset("picture.css").partition("@media")[0]
    return {
        kind: (rule["fill"], rule["line"])
        for rule in _RULE.finditer(light)
        for kind in re.findall(r"\.(\w+) > \.frame", rule["selectors"])
    }


def to_dot(picture: Picture) -> str:
    """Return the text of a DOT file."""
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
    # DOT draws edges only between nodes, and clips them at the cluster's border.
    options = []
    if source.children:
        options.append(f"ltail=cluster_{source.id}")
    if target.children:
        options.append(f"lhead=cluster_{target.id}")
    tail = f" [{', '.join(options)}]" if options else ""
    return f"{end_of(source, last=True).id} -> {end_of(target, last=False).id}{tail};"


def _quote(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def to_networkx(picture: Picture) -> nx.DiGraph:
    """Return the picture as a graph: edges are data flow, nesting is the attribute ``parent``."""
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
            linear=entry["linear"],
            trainable=entry["trainable"],
            frozen=entry["frozen"],
        )
    graph.add_edges_from((edge["source"], edge["target"]) for edge in document["edges"])
    return graph


def to_graphml(picture: Picture) -> str:
    """Return the text of a GraphML file."""
    buffer = io.BytesIO()
    nx.write_graphml_xml(to_networkx(picture), buffer)
    return buffer.getvalue().decode("utf-8")


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


Format = Literal["model-explorer"]
"""Formats without their own suffix."""

Drawable = (
    nn.Module
    | Capture
    | Plan
    | MergeReport
    | ExtractionReport
    | ExportReport
    | OnnxSession
    | str
    | os.PathLike[str]
)
"""Types that can be drawn. A text is the path of an ONNX file or of an adapter folder."""


def visualize(
    model_or_plan: Drawable | Sequence[Drawable] | Mapping[str, Drawable],
    path: str | os.PathLike[str],
    *,
    force: bool = True,
    example_inputs: Any = None,
    original: nn.Module | str | os.PathLike[str] | None = None,
    file_format: Format | None = None,
) -> Path:
    """Draw a model, a plan or a report into a file, in the format of the suffix.

    Modules are nested boxes, and modules with a graph show its nodes. Equal blocks in sequence are drawn
    once, with their number. For modules without a graph, one call of a copy without data shows the data
    flow between them. ``.svg`` and ``.html`` are for viewing. The page opens and closes boxes, searches,
    colors and tries patterns, and needs no network. ``.dot`` is for Graphviz, ``.graphml`` for networkx,
    Gephi and yEd, and ``.json`` for your own programs. It has ``boxes`` (with children), ``nodes``
    (without) and ``edges``, each box and node with its ``parent``; see
    :meth:`lora_fx.tools.draw.picture.Picture.to_dict`. The same model gives the same bytes.

    Args:
        model_or_plan: A module (plain, captured, rewritten or merged), a capture, a plan, a report of a
            merge, extraction or export, a session, or the path of an ``.onnx`` file or adapter folder. A plan
            shows its sites by name, and the other operations with the reasons. A session shows the provider
            that runs each node; a file is loaded on the CPU. Several of these, in a list or in a dict by
            their titles, are drawn next to each other, in ``.html`` only.
        path: The file to write.
        force: False to refuse an existing file instead of replacing it.
        example_inputs: A call of the model, as for :func:`lora_fx.capture`, that shows how data flows between
            modules without a graph. Models of transformers and timm need none.
        original: The model before it was quantized, or its files, as for
            :func:`lora_fx.replace_lora_weights_loftq`. The page then shows the quantization errors.
        file_format: ``"model-explorer"`` writes a ``.json`` that Google's Model Explorer loads, and next to
            it ``.nodes.json``, the ranks as its node data. None for the format of the suffix.

    Returns:
        The path of the file.

    Raises:
        ConfigError: If the suffix is unknown, the folder does not exist, or the file exists and ``force`` is
            False; or if there is an ``original`` and nothing is quantized.
        LoraFxError: If the file could not be written. An existing file is kept then.
    """
    if isinstance(path, nn.Module):
        raise ConfigError(
            f"path is a {type(path).__name__}: give the model first, then a file name"
        )
    target = output_file(path, tuple(FORMATS))
    if not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: there is no folder {target.parent}; create it")
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists, and force=False was given: leave it out, or choose another name"
        )
    suffix = target.suffix.lower()
    if file_format is not None:
        _write_for_explorer(model_or_plan, target, example_inputs, file_format)
        return target
    titled = isinstance(model_or_plan, Mapping)
    several: Any = model_or_plan.values() if isinstance(model_or_plan, Mapping) else model_or_plan
    if titled or isinstance(model_or_plan, list | tuple):
        if suffix != ".html" or not model_or_plan:
            raise ConfigError(
                "several are compared in a page: give one or more, and a name in .html"
            )
        pictures = [picture_of(drawn, example_inputs, original) for drawn in several]
        if isinstance(model_or_plan, Mapping):
            pictures = [
                dataclasses.replace(picture, title=f"{name}: {picture.title}")
                for name, picture in zip(model_or_plan, pictures, strict=True)
            ]
        text = to_html(*pictures)
    else:
        pictures = [picture_of(model_or_plan, example_inputs, original)]
        text = FORMATS[suffix](*pictures)
    if original is not None and not any(
        row.lost is not None for picture in pictures for row in picture.sites
    ):
        raise ConfigError(
            "original is given, and no weight that is drawn is quantized: leave it out"
        )
    _replace(target, text)
    return target


def _write_for_explorer(drawn: object, target: Path, example_inputs: Any, name: str) -> None:
    if name != "model-explorer":
        raise ConfigError(
            f"file_format is {name!r}: give 'model-explorer', or none for that of the suffix"
        )
    if target.suffix.lower() != ".json":
        raise ConfigError(f"Model Explorer loads .json: write {target.with_suffix('.json').name}")
    picture = picture_of(drawn, example_inputs)
    _replace(target.with_suffix(".nodes.json"), explorer_data(picture))
    _replace(target, explorer_graph(picture))


def picture_of(drawn: object, example_inputs: Any = None, original: Any = None) -> Picture:
    """Return the picture that :func:`visualize` writes."""
    if isinstance(drawn, Plan):
        return picture_of_plan(drawn)
    if isinstance(drawn, MergeReport):
        return picture_of_merge(drawn)
    if isinstance(drawn, ExtractionReport):
        return picture_of_extraction(drawn)
    if isinstance(drawn, ExportReport):
        return picture_of_file(Path(drawn.path), provider=drawn.provider)
    if isinstance(drawn, OnnxSession):
        return picture_of_file(drawn.path, drawn)
    if isinstance(drawn, str | os.PathLike):
        return _of_path(Path(drawn))
    if isinstance(drawn, Capture):
        graphs = {name: region.graph for name, region in drawn.regions.items()}
        matches = find_operations(drawn)
        return picture_of_model(
            drawn.model, graphs, matches=matches, example_inputs=example_inputs, original=original
        )
    if isinstance(drawn, nn.Module):
        graphs = graphs_of(drawn)
        record = record_of(drawn)
        if record is not None and record.frontend == "export":
            graphs.pop("", None)  # this graph of the whole model has no adapters
        if not graphs:
            return _plain(drawn, example_inputs, original)
        return picture_of_model(drawn, graphs, example_inputs=example_inputs, original=original)
    raise ConfigError(
        f"cannot draw a {type(drawn).__name__}: give an nn.Module, what lora_fx.plan() returns, the "
        "report of a merge, an extraction or an export, a session, an .onnx file or an adapter folder"
    )


def _of_path(path: Path) -> Picture:
    if path.is_dir():
        if not current(path / CONFIG_NAME).is_file():
            raise ConfigError(
                f"{path} holds no adapter, {CONFIG_NAME} is missing: give a folder that save_adapter wrote. "
                "A model is loaded first, and `lora-fx visualize hf:FOLDER` does so"
            )
        return picture_of_folder(path)
    if path.suffix.lower() == ".onnx" and path.is_file():
        return picture_of_file(path)
    if path.exists():
        raise ConfigError(f"cannot draw {path}: give an .onnx file or the folder of an adapter")
    near = hint(path.name, [file.name for file in path.parent.glob("*")], cutoff=0.5)
    raise ConfigError(
        f"there is no {path}{near}: give an .onnx file, the folder of an adapter, or a model that is loaded"
    )


def _plain(model: nn.Module, example_inputs: Any, original: Any) -> Picture:
    """Draw a model that is not rewritten. If it cannot be captured, draw only its modules."""
    try:
        captured = capture(model)
    except CaptureError as error:
        return picture_of_model(model, {}, (f"no graphs: {error}",), example_inputs=example_inputs)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    # A capture freezes its copy. The copy has its own parameter objects, so the model is not changed here.
    for name, parameter in captured.model.named_parameters():
        if trains.get(name, False):
            parameter.requires_grad_(True)
    return picture_of(captured, example_inputs, original)


def _replace(target: Path, text: str) -> None:
    try:
        with replacing(target) as new:
            new.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise LoraFxError(f"could not write {target}: {error}") from error


# --- Model Explorer -------------------------------------------------------------------------------
# Files that Google's Model Explorer loads: the graph, and ranks as data of its nodes.
#
# The formats are those of its Python package: ``graph_builder.GraphCollection`` and
# ``node_data_builder.ModelNodeData``.


_GRADIENT = ("#fdf0d3", "#10917f")


def explorer_graph(picture: Picture) -> str:
    """Return the text of a graph file: boxes without children are nodes, the others their namespaces."""
    boxes = {box.id: box for box in picture.root.walk()}
    reads: dict[str, list[str]] = defaultdict(list)
    for box in boxes.values():
        for source, target in box.edges:
            into = end_of(boxes[target], last=False).id
            reads[into].append(end_of(boxes[source], last=True).id)
    nodes = []
    groups: dict[str, dict[str, str]] = {"": _attributes(picture.facts)}
    for namespace, box in _namespaces(picture.root, ""):
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
                        "targetNodeInputId": str(index),
                    }
                    for index, source in enumerate(dict.fromkeys(reads[box.id]))
                ],
            }
        )
    graph: dict[str, Any] = {
        "id": clean(picture.title),
        "nodes": nodes,
        "groupNodeAttributes": groups,
    }
    return json.dumps({"label": clean(picture.title), "graphs": [graph]}, indent=1) + "\n"


def explorer_data(picture: Picture) -> str:
    """Return the text of a node data file: the rank of each adapted operation, summed over its adapters."""
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


def _namespaces(box: Box, outer: str) -> Iterator[tuple[str, Box]]:
    """Yield every box with its namespace. A box with children has its own, a node has that of its parent."""
    if not box.children:
        yield outer, box
        return
    own = clean(box.name).replace("/", "|")
    namespace = f"{outer}/{own}" if outer else own
    yield namespace, box
    names = Counter(child.name for child in box.children if child.children)
    for child in box.children:
        # Model Explorer would join two groups of the same name.
        repeated = child.children and names[child.name] > 1
        inner = _namespaces(child, f"{namespace}/{child.id}" if repeated else namespace)
        yield from inner
