"""Runs the benchmarks and writes ``docs/benchmarks.md``. Nobody edits that file by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lora_fx.tools.bench import rewrite_time
from lora_fx.tools.bench.measure import machine

__all__ = ["run_benchmarks"]

_HEAD = """# Benchmarks

Written by `make bench`; see `tools/bench/` for how each number is taken. Times are medians of
interleaved runs in one process in random order, with quartiles; compare ratios, not seconds.
"""


def run_benchmarks(
    path: Path, *, repeats: int = 10, progress: Callable[[int, int, str], None] | None = None
) -> str:
    """Runs everything and writes the page.

    Args:
        path: The Markdown file; it is replaced.
        repeats: Counted runs of each contender.
        progress: Called with (done, total, contender) after each run.

    Returns:
        The page.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = rewrite_time.run(repeats=repeats, progress=progress)
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    columns, rows = rewrite_time.rows(results)
    page = f"{_HEAD}\n{facts}\n\n## {rewrite_time.TITLE}\n\n{_table(columns, rows)}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return page


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
