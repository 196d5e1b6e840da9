"""A section of the page: its measurement, table and pictures. Its texts are in ``page.md``."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.tools.bench.contenders import FROZEN, OURS
from lora_fx.tools.bench.measure import Progress, Run, Size

__all__ = ["Chart", "Group", "Section", "no_charts", "words"]


# In inches; 72 of the file's units each.
_WIDTH, _ROW, _FRAME = 11.0, 0.3, 1.3
_TEXT, _GRID, _MARK = "#808080", "#80808040", "#e0447c"
_COLORS = {OURS: "#18a38e", FROZEN: "#8080804d"}
_OTHERS = "#8b95aa"
# The same figures give the same file: ids of SVG elements are not random, and text stays text.
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
    """Bars under a heading, which may be empty.

    Attributes:
        heading: The text.
        bars: Non-negative values by label, from the top.
        floor: F, which is marked across the bars, or None.
    """

    heading: str
    bars: Mapping[str, float]
    floor: float | None = None


def bars(title: str, note: str, groups: Sequence[Group]) -> str:
    """Return the text of an SVG file of horizontal bars, all on one scale that begins at 0.

    Args:
        title: Title above the chart.
        note: The unit, and how to read it.
        groups: Groups of bars, from the top.
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
                color = next((_COLORS[name] for name in _COLORS if label.startswith(name)), _OTHERS)
                axes.barh(y, value, height=0.7, color=color)
                axes.annotate(
                    _value(value), (value, y), (5, 0), "data", "offset points", va="center"
                )
                labels[y] = label
                y += 1
            if group.floor is not None:
                axes.vlines(group.floor, start - 0.5, y - 0.5, _MARK, "dashed")
                mark = f"F {_value(group.floor)}"
                axes.text(group.floor, start - 0.55, mark, color=_MARK, fontsize=9, va="bottom")
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
    """Format a value with about three digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


Chart = tuple[str, str, Sequence[Group]]
"""The title of a picture, how to read it, and its groups of bars."""


@functools.cache
def words() -> Mapping[str, str]:
    """Read the texts of the page from ``page.md``: the head, and the title and caption of each section."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^<!-- (\w+) -->\n", text, flags=re.MULTILINE)
    return {name: part.strip() for name, part in zip(parts[::2], parts[1::2], strict=True)}


def no_charts(results: Any) -> dict[str, Chart]:
    """Return no charts: the default for a section that has only a table."""
    return {}


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of the benchmarks: a measurement with its table and pictures.

    Attributes:
        name: Name on the command line.
        columns: Columns of the table.
        measure: Returns the results.
        cells: Returns the rows of the table of the results.
        pictures: Returns the pictures of the results, by file name.
    """

    name: str
    columns: Sequence[str]
    measure: Callable[[Run], Any]
    cells: Callable[[Any], Iterable[Sequence[str]]]
    pictures: Callable[[Any], Mapping[str, Chart]] = no_charts

    @property
    def title(self) -> str:
        """Return the heading of the section."""
        return words()[self.name].partition("\n")[0].removeprefix("## ")

    @property
    def caption(self) -> str:
        """Return the text about the measurement."""
        return words()[self.name].partition("\n")[2].strip()

    def run(
        self, *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
    ) -> Any:
        """Measure and return the results.

        Args:
            repeats: Counted runs of each contender.
            size: Amount of the section to measure.
            progress: Called with (done, total, contender) after each run.
        """
        return self.measure(Run(repeats, size, progress))

    def rows(self, results: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the headings and the cells of the section's table, for results of a measurement."""
        return tuple(self.columns), [tuple(row) for row in self.cells(results)]

    def charts(self, results: Any) -> dict[str, str]:
        """Return the section's pictures for results of a measurement, as SVG texts by file name."""
        return {file: bars(*chart) for file, chart in self.pictures(results).items()}
