"""Bar charts as SVG files that can be read on a light and on a dark page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from xml.sax.saxutils import escape

__all__ = ["Bar", "Group", "bars"]

_WIDTH = 790
_LEFT = 300
_RIGHT = 70
_ROW = 22
_TOP = 66
_FOOT = 18

_SANS = 'ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
# No variables, as in the pictures of graphs: Inkscape and librsvg know none.
_STYLE = f"""
.page {{ fill: #ffffff; }}
text {{ font: 12px {_SANS}; fill: #1c2333; }}
.title {{ font-size: 16px; font-weight: 650; }}
.note, .axis {{ fill: #566079; }}
.group {{ font-weight: 650; }}
.value {{ stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; }}
.mark {{ font-size: 11px; fill: #cb3a66; }}
.grid {{ stroke: #e1e5ec; }}
.line {{ stroke: #cb3a66; stroke-dasharray: 4 3; }}
.ours {{ fill: #10917f; }}
.theirs {{ fill: #8b95aa; }}
.base {{ fill: #c3c8d2; }}
@media (prefers-color-scheme: dark) {{
  .page {{ fill: #12151c; }}
  text {{ fill: #e4e8f1; }}
  .note, .axis {{ fill: #a4aec3; }}
  .value {{ stroke: #12151c; }}
  .mark {{ fill: #ff7a9f; }}
  .grid {{ stroke: #2b3242; }}
  .line {{ stroke: #ff7a9f; }}
  .ours {{ fill: #2fbba6; }}
  .theirs {{ fill: #77839b; }}
  .base {{ fill: #4b566d; }}
}}
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: What stands before it.
        value: Its length, not negative.
        kind: ``ours``, ``theirs`` or ``base``: its colour.
    """

    label: str
    value: float
    kind: str = "theirs"


@dataclasses.dataclass(frozen=True)
class Group:
    """Bars under a heading; none if it is empty.

    Attributes:
        heading: The text.
        bars: From the top.
        line: A value that is marked across them, or None.
        mark: What it is; with its value it stands above the line.
    """

    heading: str
    bars: Sequence[Bar]
    line: float | None = None
    mark: str = "F"


def bars(title: str, note: str, groups: Sequence[Group]) -> str:
    """The text of an SVG file of horizontal bars, all on one scale that begins at 0.

    Args:
        title: Above the chart.
        note: The unit, and how to read it.
        groups: From the top.
    """
    values = [bar.value for group in groups for bar in group.bars]
    values += [group.line for group in groups if group.line is not None]
    step, most = _scale(max(values, default=1.0))
    unit = (_WIDTH - _LEFT - _RIGHT) / most
    # In the order in which they are drawn: a line crosses bars, and values are written over it.
    boxes: list[str] = []
    lines: list[str] = []
    words: list[str] = []
    y = float(_TOP)
    for group in groups:
        if group.heading:
            words.append(
                f'<text class="group" x="16" y="{_n(y + 15)}">{escape(group.heading)}</text>'
            )
            y += _ROW
        start = y
        for bar in group.bars:
            boxes.append(_box(bar, y, unit))
            words += _words(bar, y, unit)
            y += _ROW
        if group.line is not None:
            x = _n(_LEFT + group.line * unit)
            lines.append(f'<line class="line" x1="{x}" x2="{x}" y1="{_n(start)}" y2="{_n(y)}"/>')
            said = f"{escape(group.mark)} {_value(group.line)}"
            words.append(f'<text class="mark" x="{x}" y="{_n(start - 5)}">{said}</text>')
    height = y + _FOOT + 8
    grid = []
    for place in range(round(most / step) + 1):
        x = _n(_LEFT + place * step * unit)
        grid.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_n(y)}"/>')
        label = f"{place * step:g}"
        grid.append(
            f'<text class="axis" x="{x}" y="{_n(y + 15)}" text-anchor="middle">{label}</text>'
        )
    size = f'width="{_WIDTH}" height="{_n(height)}" viewBox="0 0 {_WIDTH} {_n(height)}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>',
            f"<title>{escape(title)}</title>",
            f"<style>{escape(_STYLE)}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{_n(height)}" rx="8"/>',
            f'<text class="title" x="16" y="28">{escape(title)}</text>',
            f'<text class="note" x="16" y="48">{escape(note)}</text>',
            *grid,
            *boxes,
            *lines,
            *words,
            "</svg>",
            "",
        ]
    )


def _box(bar: Bar, y: float, unit: float) -> str:
    place = f'x="{_LEFT}" y="{_n(y + 3)}" width="{_n(bar.value * unit)}" height="{_ROW - 6}"'
    return f'<rect class="{bar.kind}" {place} rx="2"/>'


def _words(bar: Bar, y: float, unit: float) -> list[str]:
    place = f'x="{_n(_LEFT + bar.value * unit + 6)}" y="{_n(y + 15)}"'
    return [
        f'<text x="{_LEFT - 8}" y="{_n(y + 15)}" text-anchor="end">{escape(bar.label)}</text>',
        f'<text class="value" {place}>{_value(bar.value)}</text>',
    ]


def _value(value: float) -> str:
    """With three digits or so."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _scale(largest: float) -> tuple[float, float]:
    """A round step of the axis, and its end."""
    if largest <= 0:
        return 1.0, 1.0
    power = 1e-9
    while True:
        for factor in (1, 2, 5):
            step = factor * power
            if largest <= 8 * step:
                count = -(-largest // step)
                return step, max(count, 1) * step
        power *= 10


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
