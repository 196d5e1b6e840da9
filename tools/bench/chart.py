"""Bar charts as SVG files that can be read on a light and on a dark page."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence

from lora_fx.tools.bench.contenders import FROZEN, OURS

__all__ = ["Group", "bars"]

# In inches; 72 of the file's units each.
_WIDTH, _ROW, _FRAME = 11.0, 0.3, 1.3
_TEXT, _GRID, _MARK = "#808080", "#80808040", "#e0447c"
_COLORS = {OURS: "#18a38e", FROZEN: "#8080804d"}
_OTHERS = "#8b95aa"
# The same text for the same figures: names of parts are no random numbers, and text stays text.
_STYLE = {
    "svg.hashsalt": "lora-fx",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Bars under a heading; none if it is empty.

    Attributes:
        heading: The text.
        bars: Values, not negative, by the label that stands before each, from the top.
        floor: F, which is marked across them, or None.
    """

    heading: str
    bars: Mapping[str, float]
    floor: float | None = None


def bars(title: str, note: str, groups: Sequence[Group]) -> str:
    """The text of an SVG file of horizontal bars, all on one scale that begins at 0.

    Args:
        title: Above the chart.
        note: The unit, and how to read it.
        groups: From the top.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = sum(len(group.bars) + bool(group.heading) for group in groups)
    with mpl.rc_context(_STYLE):
        figure = Figure((_WIDTH, _FRAME + _ROW * rows), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontsize=15, fontweight="bold")
        axes.set_xlabel(note, loc="left")
        labels: dict[int, str] = {}
        y = 0
        for group in groups:
            if group.heading:
                axes.text(0, y, group.heading, fontweight="bold", va="center")
                y += 1
            start = y
            for label, value in group.bars.items():
                color = next((_COLORS[one] for one in _COLORS if label.startswith(one)), _OTHERS)
                axes.barh(y, value, height=0.7, color=color)
                axes.annotate(
                    _value(value), (value, y), (5, 0), "data", "offset points", va="center"
                )
                labels[y] = label
                y += 1
            if group.floor is not None:
                axes.vlines(group.floor, start - 0.5, y - 0.5, _MARK, "dashed")
                said = f"F {_value(group.floor)}"
                axes.text(group.floor, start - 0.55, said, color=_MARK, fontsize=9, va="bottom")
        axes.set_yticks([*labels], [*labels.values()])
        axes.set_ylim(y - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def _value(value: float) -> str:
    """With three digits or so."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
