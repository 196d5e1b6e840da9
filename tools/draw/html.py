"""A picture as one HTML page that needs no network: boxes open and close, search, zoom."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any
from xml.sax.saxutils import escape

from lora_fx.tools.draw.layout import CHIPS, METRICS, plan_layers, sizes_of, words_of
from lora_fx.tools.draw.picture import Box, Kind, Picture, clean

__all__ = ["document_of", "initially_open", "to_html"]

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
        "legend": _legend(picture),
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


def _legend(picture: Picture) -> str:
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
    return (resources.files("lora_fx.tools") / "viewer" / name).read_text("utf-8")


def _text(text: str) -> str:
    return escape(clean(text), {'"': "&quot;"})
