"""Runs the benchmarks and writes ``docs/benchmarks.md``. That file is not edited by hand."""

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
    one.name: one
    for one in (
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
"""By name, in the order of ``page.md``."""

IMAGES = "img"
"""The folder of the pictures, next to the page."""

_NOTHING = ("", "–")


def select(only: Iterable[str] | None) -> dict[str, Section]:
    """The sections of these names, all without names, in the order of the page.

    Raises:
        ConfigError: If there is no section of a name.
    """
    wanted = set(only or ())
    if unknown := sorted(wanted - set(SECTIONS)):
        raise ConfigError(
            f"no section of the benchmark is called {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(SECTIONS)}"
        )
    return {name: one for name, one in SECTIONS.items() if not wanted or name in wanted}


def run_benchmarks(
    *,
    only: Iterable[str] | None = None,
    repeats: int = 10,
    size: Size = Size.FULL,
    progress: Progress | None = None,
) -> tuple[str, dict[str, str]]:
    """Runs sections and makes the page.

    Args:
        only: Names of sections; all of them by default.
        repeats: Counted runs of each contender.
        size: How much of each section.
        progress: Called with (done, total, section and contender) after each run; the total is that of
            one section.

    Returns:
        The page, and its pictures by file name.

    Raises:
        ConfigError: If there is no section of a name.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = select(only)
    began = time.monotonic()
    results = {
        name: section.run(
            repeats=repeats, size=size, progress=_within(progress, place, len(chosen), name)
        )
        for place, (name, section) in enumerate(chosen.items(), 1)
    }
    minutes = (time.monotonic() - began) / 60
    facts = {**machine(), "this run": f"{minutes:.1f} minutes, {repeats} counted turns at most"}
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    quick = "" if size is Size.FULL else f"\n{words()['quick']}\n"
    parts = [f"{words()['head']}\n{quick}\n{listed}\n"]
    met = markdown(goals.COLUMNS, goals.rows(results, functools.partial(reference, chosen)))
    parts.append("\n".join(["## Goals", "", *met, ""]))
    images: dict[str, str] = {}
    for name, section in chosen.items():
        drawn = section.charts(results[name])
        images |= drawn
        shown = "".join(f"![{_alt(file)}]({IMAGES}/{file})\n\n" for file in drawn)
        table = "\n".join(markdown(*without_empty(*section.rows(results[name]))))
        parts.append(f"## {section.title}\n\n{section.caption}\n\n{shown}{table}\n")
    return "\n".join(parts), images


def without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that say nothing in any row: those of a GPU where there is none."""
    kept = [any(one not in _NOTHING for one in column) for column in zip(*rows, strict=True)]
    left, *lines = ([*itertools.compress(one, kept)] for one in (columns, *rows))
    return left, lines


def write(path: Path, page: str, images: dict[str, str]) -> None:
    """Writes the page and, into a folder next to it, its pictures; existing files are replaced."""
    folder = path.parent / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in images.items():
        (folder / name).write_text(text, encoding="utf-8")
    path.write_text(page, encoding="utf-8")


def _within(progress: Progress | None, place: int, count: int, name: str) -> Progress | None:
    if progress is None:
        return None
    tell = progress

    def advance(done: int, total: int, what: str) -> None:
        tell(done, total, f"{place}/{count} {name}: {what}"[:40])

    return advance


def reference(chosen: Mapping[str, Any], name: str) -> str:
    """A section's title, as a link if the section is on the page."""
    title = SECTIONS[name].title
    if name not in chosen:
        return title
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title}](#{anchor})"


def _alt(file: str) -> str:
    return file.removesuffix(".svg").replace("-", " ")
