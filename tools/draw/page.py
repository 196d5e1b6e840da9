"""Pictures as one HTML page: the data, and the files of ``viewer/`` that lay it out and draw it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any
from xml.sax.saxutils import escape

from lora_fx.config import ALL_LINEAR, LoraConfig, saved_entries
from lora_fx.tools.draw.layout import (
    CHIPS,
    METRICS,
    Layers,
    count_of,
    lines_of,
    mark_width,
    plan_layers,
    sizes_of,
    words_of,
)
from lora_fx.tools.draw.picture import Box, Kind, Picture, SiteRow, Target, clean, is_internal

__all__ = ["asset", "classes_of", "document_of", "fill_page", "initially_open", "to_html"]

SCRIPTS = ("theme.js", "place.js", "paint.js", "find.js", "graph.js", "viewer.js")

_VISIBLE = 130
"""Approximate number of boxes that a screen shows with legible names."""

_SPECIAL = re.compile(r"[\\^$*+?()\[\]{}|]")
"""Characters that make a text a regular expression, as in ``find.js``."""

_MODULES = frozenset({Kind.LEAF, Kind.CALL, Kind.SITE, Kind.SKIPPED, Kind.REJECTED})


def to_html(*pictures: Picture) -> str:
    """Return the text of an HTML file that shows a picture, or several next to each other."""
    return fill_page(
        "page.html",
        " · ".join(dict.fromkeys(picture.title for picture in pictures)),
        [document_of(picture) for picture in pictures],
        picture=["picture.css"],
        style=["page.css"],
        script=SCRIPTS,
    )


def fill_page(template: str, title: str, data: Any, **files: Iterable[str]) -> str:
    """Return the text of an HTML file.

    Args:
        template: Name of the file in ``viewer/`` with fields such as ``{{title}}`` and ``{{data}}``.
        title: Title of the page.
        data: Value that the page's script reads as JSON.
        files: Names of files in ``viewer/`` by the field that their texts fill.
    """
    # Escaped so that the data cannot end the script element: </script>, <!--, ]]>.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {name: "".join(map(asset, names)) for name, names in files.items()}
    parts |= {"title": _text(title), "data": text}
    # In a single pass, so that inserted texts are not substituted again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset(template))


class _Strings:
    """A table of texts, so that each text is in the page once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.places.setdefault(clean(text), len(self.places))


def document_of(picture: Picture) -> dict[str, Any]:
    """Return the data that the page needs to draw a picture.

    ``boxes`` lists parents before their children. A box refers to its ``parent`` and its ``children`` by
    index in this list, and to texts by index in ``strings``. Empty values are left out.

    ``layouts`` has the rows of boxes, once for equal boxes. An entry of a row is the index of a child, or a
    negative number for an edge that passes through the row.
    """
    strings = _Strings()
    opened = initially_open(picture.root)
    layers = plan_layers(picture)
    boxes = list(picture.root.walk())
    indices = {box.id: index for index, box in enumerate(boxes)}
    parents = {child.id: indices[box.id] for box in boxes for child in box.children}
    layouts: dict[str, int] = {}
    adapters = {name: index for index, name in enumerate(picture.adapters)}
    entries = []
    for box in boxes:
        box_layers = layers.get(box.id)
        elements = (box.trainable + box.frozen) // max(len(box.repeats), 1)
        entry: dict[str, Any] = {
            **_words(box, strings),
            "parent": parents.get(box.id),
            "children": [indices[child.id] for child in box.children],
            "open": box.id in opened,
            "layout": None
            if box_layers is None
            else layouts.setdefault(_layout(box, box_layers), len(layouts)),
            "sites": box.sites,
            "bare": box.is_bare,
            "partial": box.is_partial,
            "elements": (elements or None) if picture.counted else None,
            "lines": [
                [strings(line.words), adapters.get(line.adapter, 0), int(line.active)]
                for line in lines_of(box)
            ],
            "ranks": sorted({line.rank for line in box.branches if line.rank}),
            "adapter": adapters.get(box.adapter) if box.adapter else None,
        }
        entries.append({key: value for key, value in entry.items() if _told(value)})
    return {
        "title": clean(picture.title),
        "summary": [[clean(label), clean(value)] for label, value in picture.facts],
        "legend": [[sign.look, clean(sign.text)] for sign in picture.legend],
        "notes": [clean(note) for note in picture.notes],
        "adapters": [clean(name) for name in picture.adapters],
        "boxes": entries,
        "layouts": [json.loads(text) for text in layouts],
        "columns": [field.name for field in dataclasses.fields(SiteRow)],
        "sites": [_row(row, strings) for row in picture.sites],
        "texts": [
            index for index, field in enumerate(dataclasses.fields(SiteRow)) if _is_text(field)
        ],
        "targets": [_target(target, strings) for target in picture.targets],
        "config": _typed(picture.config),
        "unit": picture.unit,
        "strings": list(strings.places),
        "metrics": METRICS,
        "chips": {str(kind): letter for kind, letter in CHIPS.items()},
    }


def _words(box: Box, strings: _Strings) -> dict[str, Any]:
    """Return the texts of a box, as indices in ``strings``, and the room that they take."""
    name, caption = words_of(box)
    width, height = sizes_of(box)
    count = count_of(box)
    return {
        "kind": strings(str(box.kind)),
        "name": strings(name),
        "caption": caption and strings(caption),
        "fqn": strings(box.fqn),
        "size": [width, int(height)],
        "facts": [strings(t) for fact in box.facts if not is_internal(fact[0]) for t in fact],
        "internals": [strings(t) for fact in box.facts if is_internal(fact[0]) for t in fact],
        "repeats": [strings(fqn) for fqn in box.repeats],
        "parameters": [strings(name) for name in box.parameters],
        "count": count and strings(count),
        "state": str(box.state) and strings(str(box.state)),
        "marks": [[strings(mark), mark_width(clean(mark))] for mark in box.marks],
    }


def _told(value: Any) -> bool:
    return value is not None and value != [] and value != "" and value is not False


def _is_text(field: dataclasses.Field[Any]) -> bool:
    return field.type in ("str", "State", "tuple[int, ...]")


def _row(row: SiteRow, strings: _Strings) -> list[Any]:
    values = []
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name == "shape":
            value = "×".join(map(str, value))
        if isinstance(value, str):
            value = strings(str(value))
        elif isinstance(value, float):
            value = float(f"{value:.4g}") if math.isfinite(value) else None
        values.append(value)
    return values


def _target(target: Target, strings: _Strings) -> dict[str, Any]:
    """Return a target without empty values, with texts as their indices."""
    entry: dict[str, Any] = {}
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if value:
            entry[field.name] = strings(value) if isinstance(value, str) else value
    entry["parts"] = [[strings(name), *rows] for name, rows in target.parts]
    return {"name": strings(target.name)} | {key: v for key, v in entry.items() if _told(v)}


FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "scope",
)
"""Fields of a configuration that can be typed into the page, in addition to ``r`` and ``lora_alpha``."""

_UNCOUNTED = ("bias", "trainable_token_indices", "ensure_weight_tying")
"""Fields for other selections or training, which the page does not count."""


def _typed(config: LoraConfig | None) -> dict[str, Any]:
    """Return a configuration as it is typed into the page: texts by field, and fields that the page lacks.

    The seed is left out, because a rewrite draws one anyway, and it belongs to the old selection.
    """
    config = config or LoraConfig()
    default = LoraConfig().to_dict()
    values = {key: v for key, v in config.to_dict().items() if v != default.get(key)}
    unsupported = {
        key: v
        for key, v in values.items()
        if key not in (*FIELDS, "r", "lora_alpha", "inference_mode", "seed")
    }
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "typed": {key: _text_of(getattr(config, key)) for key in FIELDS},
        "rest": unsupported,
        "heads": [
            entry for entry in saved_entries(config) if entry not in (config.modules_to_save or ())
        ],
        "uncounted": [key for key in _UNCOUNTED if key in unsupported],
    }


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        # An expression that looks like a name would be read as a name.
        plain = value != ALL_LINEAR and not _SPECIAL.search(value)
        return f"(?:{value})" if plain else value
    entries = [value] if isinstance(value, int) else list(value)
    listed = [str(text) for text in entries]
    if not listed or any(_SPECIAL.search(text) or re.search(r"[\s,]", text) for text in listed):
        return json.dumps(listed)
    return ", ".join(listed)


def _layout(box: Box, layers: Layers) -> str:
    """Return rows and links of a box by the indices of its children, equal for equal blocks."""
    indices = {child.id: index for index, child in enumerate(box.children)}

    def ref(name: str) -> int:
        return indices[name] if name in indices else -1 - int(name[1:])

    rows = [
        [[ref(name) for name in row], [layers.centers[name] for name in row]] for row in layers.rows
    ]
    links = [
        [*map(ref, link), *port] for link, port in zip(layers.links, layers.ports, strict=True)
    ]
    return json.dumps({"rows": rows, "links": links}, separators=(",", ":"))


def classes_of(box: Box, *, is_open: bool, depth: int, adapters: Sequence[str] = ()) -> str:
    """Return the style classes of a box, the same as ``classesOf`` in ``graph.js`` on the page."""
    classes = ["box", str(box.kind)]
    if is_open:
        classes += ["open", "odd"] if depth % 2 else ["open"]
    if box.children and box.sites:
        classes.append("holds")
    if box.is_bare:
        classes.append("bare")
    if box.state:
        classes.append(f"is-{box.state}")
    if box.adapter and box.kind is not Kind.SITE and box.adapter in adapters:
        classes.append(f"a{adapters.index(box.adapter) % 6}")
    return " ".join(classes)


def initially_open(root: Box) -> set[str]:
    """Return the ids of the initially open boxes: the levels that fit a screen, and at least one adapter.

    In a picture with adapters, boxes without one stay closed.
    """
    opened: set[str] = set()
    visible = 1
    level = [root] if root.children else []
    while level:
        # A level opens as a whole, so that equal boxes look equal. The inside of a norm or an activation
        # is not of first interest.
        adapted = [box for box in level if box.sites]
        plain = [box for box in level if not box.sites and any(map(_is_module, box.children))]
        for group in (adapted,) if root.sites else (plain,):
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


def _is_module(box: Box) -> bool:
    return bool(box.children) or box.kind in _MODULES


def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return (resources.files("lora_fx.tools.draw") / "viewer" / name).read_text("utf-8")


def _text(text: str) -> str:
    return escape(clean(text), {'"': "&quot;"})
