"""A section of the page: how it is measured, its table, its pictures; its words are in ``page.md``."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.tools.bench.chart import Group, bars
from lora_fx.tools.bench.measure import Progress, Size

__all__ = ["Chart", "Section", "no_charts", "words"]

Chart = tuple[str, str, Sequence[Group]]
"""Of a picture: its title, how to read it, and what is drawn."""


@functools.cache
def words() -> Mapping[str, str]:
    """The texts of the page by name: its head, and of each section the title, then what was measured."""
    text = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^<!-- (\w+) -->\n", text, flags=re.MULTILINE)
    return {name: part.strip() for name, part in zip(parts[::2], parts[1::2], strict=True)}


def no_charts(results: Any) -> dict[str, Chart]:
    """A section that has a table alone."""
    return {}


@dataclasses.dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: What the command line calls it.
        columns: Of its table.
        measure: Gets the counted repeats, the size and the progress, and gives results.
        cells: Makes the rows of the table of the results.
        pictures: Makes pictures of them, by file name.
    """

    name: str
    columns: Sequence[str]
    measure: Callable[[int, Size, Progress | None], Any]
    cells: Callable[[Any], Iterable[Sequence[str]]]
    pictures: Callable[[Any], Mapping[str, Chart]] = no_charts

    @property
    def title(self) -> str:
        """Its heading."""
        return words()[self.name].partition("\n")[0].removeprefix("## ")

    @property
    def caption(self) -> str:
        """What was measured."""
        return words()[self.name].partition("\n")[2].strip()

    def run(
        self, *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
    ) -> Any:
        """Measures.

        Args:
            repeats: Counted runs of each contender.
            size: How much of it.
            progress: Called with (done, total, contender) after each run.
        """
        return self.measure(repeats, size, progress)

    def rows(self, results: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table: columns and cells."""
        return tuple(self.columns), [tuple(row) for row in self.cells(results)]

    def charts(self, results: Any) -> dict[str, str]:
        """Pictures by file name."""
        return {file: bars(*chart) for file, chart in self.pictures(results).items()}
