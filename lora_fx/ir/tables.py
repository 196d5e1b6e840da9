"""Tables for reports, as text and as HTML, which fold rows of equal layers into one row; and JSON.

Plans, reports and status use these functions for their text and for their display in a notebook.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_fx.errors import some

__all__ = [
    "FoldedRow",
    "folded",
    "folded_names",
    "grouped",
    "html_block",
    "html_folded",
    "html_lines",
    "html_table",
    "json_text",
    "plain",
    "text_table",
]

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.(]|$)|^\d+(?=[.(]|$)")


@dataclass(frozen=True, slots=True)
class FoldedRow:
    """Rows with equal cells whose names differ only in numbers.

    Attributes:
        name: Their common name, ``layers.{0-31}.self_attn.q_proj``.
        count: The number of rows.
        cells: The other columns.
    """

    name: str
    count: int
    cells: tuple[str, ...]

    @property
    def times(self) -> str:
        """The count, as ``×32``; empty for a single row."""
        return f"×{self.count}" if self.count > 1 else ""


def folded(rows: Iterable[tuple[str, ...]]) -> list[FoldedRow]:
    """Fold rows with equal cells whose names differ only in numbers into single rows, in order of appearance.

    Args:
        rows: Names, each with its cells.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        groups.setdefault((_NUMBER.sub("*", name), *cells), []).append(name)
    return [
        FoldedRow(folded_names(names), len(names), tuple(key[1:])) for key, names in groups.items()
    ]


def grouped(rows: Iterable[tuple[str, ...]], most: int = 5) -> list[FoldedRow]:
    """Fold rows as :func:`folded` does, and then join rows with the same cells into one.

    Args:
        rows: Names, each with its cells.
        most: The largest number of names in a row. The number of further names follows them.
    """
    groups: dict[tuple[str, ...], list[FoldedRow]] = {}
    for row in folded(rows):
        groups.setdefault(row.cells, []).append(row)
    return [
        FoldedRow(
            some([f"{row.name} {row.times}".rstrip() for row in group], most),
            sum(row.count for row in group),
            cells,
        )
        for cells, group in groups.items()
    ]


def folded_names(names: Sequence[str]) -> str:
    """Return one name for names that differ in numbers: ``h.{0-11}.attn``, ``h.{0,2}.{1-3}``."""
    if len(names) == 1:
        return names[0]
    numbers = [_NUMBER.findall(name) for name in names]
    columns: list[set[int]] = [{int(n) for n in column} for column in zip(*numbers, strict=True)]
    spans = iter(_span(sorted(column)) for column in columns)
    return _NUMBER.sub(lambda _: next(spans), names[0])


def _span(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lay a table out in lines of text.

    Args:
        columns: The headings.
        rows: The cells.
        left: The number of columns to align left, because they have text. The others are aligned right.
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return [line(columns), "  ".join("-" * width for width in widths), *map(line, rows)]


# A click on a heading sorts by that column, numbers as numbers, and the next click reverses it.
_SORT = (
    "const h=this,i=h.cellIndex,b=h.closest('table').tBodies[0],u=h.dataset.up!=='1',"
    "v=r=>r.cells[i].textContent,n=t=>parseFloat(t.replace(/[,×]/g,''));h.dataset.up=u?1:0;"
    "[...b.rows].sort((p,q)=>{const s=v(p),t=v(q),c=isNaN(n(s))||isNaN(n(t))"
    "?s.localeCompare(t,undefined,{numeric:true}):n(s)-n(t);return u?c:-c})"
    ".forEach(r=>b.append(r))"
)


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lay a table out in HTML. Text is escaped, and a click on a heading sorts.

    Args:
        columns: The headings.
        rows: The cells.
        left: The number of columns to align left.
    """

    def cells(tag: str, texts: Sequence[str], more: str = "") -> str:
        return "".join(
            f'<{tag} style="text-align:{"left" if i < left else "right"}"{more}>{escape(text)}</{tag}>'
            for i, text in enumerate(texts)
        )

    click = f' title="sort" onclick="{escape(_SORT)}"'
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', columns, click)}</tr></thead>"
    return f"<table>{head}<tbody>{body}</tbody></table>"


def html_lines(lines: Iterable[str], mark: str = "") -> str:
    """Write lines of text in HTML, one below the other, each with a prefix (``mark``)."""
    return "".join(f"<div>{mark}{escape(line)}</div>" for line in lines)


def html_folded(columns: Sequence[str], rows: Iterable[tuple[str, ...]], left: int = 3) -> str:
    """Write an HTML table of folded rows: names, their counts, and cells of text."""
    shown = [(row.name, row.times, *row.cells) for row in folded(rows)]
    return html_table((columns[0], "", *columns[1:]), shown, left)


def html_block(title: str, body: str, *, opened: bool = False) -> str:
    """Wrap HTML in a block that a click on its title opens and closes.

    Args:
        title: Text.
        body: HTML.
        opened: True to open it at first.
    """
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def plain(value: Any) -> Any:
    """Convert dataclasses and containers to dicts and lists for JSON; a number that is not finite to None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: object) -> str:
    """Convert a report to JSON text: paths and dtypes by their names, NaN and infinity as null."""
    return json.dumps(plain(value), indent=2, allow_nan=False, default=str)
