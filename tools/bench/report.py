"""Command that runs the benchmarks and writes ``docs/benchmarks.md``, which is never edited by hand."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.errors import ConfigError
from lora_fx.tools.bench import (
    export_peers,
    generation,
    goals,
    guards,
    learning,
    one_linear,
    onnx_latency,
    step_sections,
    verbs,
)
from lora_fx.tools.bench.measure import Progress, Size, machine, markdown
from lora_fx.tools.bench.section import Section, words

__all__ = ["run_benchmarks", "select", "write"]

_LISTED = {
    section.name: section
    for section in (
        *step_sections.SECTIONS,
        *verbs.SECTIONS,
        one_linear.SECTION,
        one_linear.KERNEL_SECTION,
        guards.SECTION,
        *learning.SECTIONS,
        export_peers.SECTION,
        onnx_latency.SECTION,
        generation.SECTION,
        generation.RUNS_SECTION,
        onnx_latency.BANK_SECTION,
    )
}
SECTIONS: dict[str, Section] = {name: _LISTED[name] for name in words() if name in _LISTED}
"""Sections by name, in the order of ``page.md``."""

IMAGES = "img"
"""The folder of the pictures, next to the page."""

_NOTHING = ("", "–")


def select(only: Iterable[str] | None) -> dict[str, Section]:
    """Return the sections of these names, or all sections if no names are given, in the page's order.

    Raises:
        ConfigError: If a name has no section.
    """
    wanted = set(only or ())
    if unknown := sorted(wanted - set(SECTIONS)):
        raise ConfigError(
            f"no section of the benchmark is called {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(SECTIONS)}"
        )
    return {name: section for name, section in SECTIONS.items() if not wanted or name in wanted}


def run_benchmarks(
    *,
    only: Iterable[str] | None = None,
    repeats: int = 10,
    size: Size = Size.FULL,
    progress: Progress | None = None,
) -> tuple[str, dict[str, str]]:
    """Run sections and make the page.

    Args:
        only: Names of sections; all by default.
        repeats: Counted runs of each contender.
        size: Amount of each section to measure.
        progress: Called with (done, total, section and contender) after each run; the total is that of
            one section.

    Returns:
        The page, and its pictures by file name.

    Raises:
        ConfigError: If a name has no section.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = select(only)
    began = time.monotonic()
    results = {
        name: section.run(
            repeats=repeats, size=size, progress=_within(progress, number, len(chosen), name)
        )
        for number, (name, section) in enumerate(chosen.items(), 1)
    }
    minutes = (time.monotonic() - began) / 60
    facts = {**machine(), "this run": f"{minutes:.1f} minutes, {repeats} counted turns at most"}
    quick = "" if size is Size.FULL else f"\n{words()['quick']}\n"
    shown_sections = {name: section for name, section in chosen.items() if results[name]}
    rows = goals.rows(results, functools.partial(reference, shown_sections))
    missing = [section.title for name, section in chosen.items() if name not in shown_sections]
    parts = [f"{words()['head']}\n{quick}", *opening(rows, goals.gains(results), missing, facts)]
    images: dict[str, str] = {}
    for name, section in shown_sections.items():
        drawn = section.charts(results[name])
        images |= drawn
        shown = "".join(f"![{_alt(file)}]({IMAGES}/{file})\n\n" for file in drawn)
        table = "\n".join(markdown(*without_empty(*section.rows(results[name]))))
        parts.append(f"## {section.title}\n\n{section.caption}\n\n{shown}{table}\n")
    return "\n".join(parts), images


def opening(
    rows: Sequence[goals.Row],
    gains: Sequence[tuple[str, str, str]],
    missing: Sequence[str],
    facts: Mapping[str, str],
) -> list[str]:
    """Return the paragraphs before the sections of the page: gains, missed goals, met goals, the method.

    Args:
        rows: All goals.
        gains: What users gain: a text, our figure, and PEFT's.
        missing: Titles of sections without results.
        facts: The machine and its packages.
    """
    measured = [row for row in rows if row.measured != goals.NOT_MEASURED]
    met = [row for row in measured if not row.bound]
    missed = [row for row in measured if row.bound]
    left_out = [*(row.workload for row in rows if row.measured == goals.NOT_MEASURED), *missing]
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    parts = [
        _table("What you gain", ("", "lora-fx", "PEFT"), gains),
        _table(
            f"Missed goals: {len(missed)} of {len(measured)}",
            ("workload", "goal", "measured", "missed by", "what bounds it"),
            [
                (row.workload, row.goal, row.measured, row.met.removeprefix("no, by "), row.bound)
                for row in missed
            ],
        ),
        f"Not measured on this machine: {'; '.join(left_out)}.\n" if left_out else "",
        _table(
            "Goals that were met",
            ("workload", "PEFT, when the goal was set", "goal", "measured"),
            [row[:4] for row in met],
        ),
        f"{words()['method']}\n\n{listed}\n",
    ]
    return [part for part in parts if part]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a heading with a table, or an empty string for a table without rows."""
    return "\n".join([f"## {title}", "", *markdown(columns, rows), ""]) if rows else ""


def without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns whose cells are all empty, such as GPU columns without a GPU."""
    kept = [any(cell not in _NOTHING for cell in column) for column in zip(*rows, strict=True)]
    left, *lines = ([*itertools.compress(row, kept)] for row in (columns, *rows))
    return left, lines


def write(path: Path, page: str, images: dict[str, str]) -> None:
    """Write the page and, into a folder next to it, its pictures. Existing files are replaced."""
    folder = path.parent / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in images.items():
        (folder / name).write_text(text, encoding="utf-8")
    path.write_text(page, encoding="utf-8")


def _within(progress: Progress | None, number: int, count: int, name: str) -> Progress | None:
    if progress is None:
        return None
    tell = progress

    def advance(done: int, total: int, text: str) -> None:
        tell(done, total, f"{number}/{count} {name}: {text}"[:40])

    return advance


def reference(chosen: Mapping[str, Any], name: str) -> str:
    """Return a section's title, as a link if the section is on the page."""
    title = SECTIONS[name].title
    if name not in chosen:
        return title
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


def _alt(file: str) -> str:
    return file.removesuffix(".svg").replace("-", " ")
