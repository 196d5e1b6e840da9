"""Runs the benchmarks and writes ``docs/benchmarks.md``. Nobody edits that file by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_fx.tools.bench import dora_step, expert_step, merge_error, rewrite_time
from lora_fx.tools.bench.measure import machine

__all__ = ["run_benchmarks"]

# Modules with TITLE, caption(), run(repeats, progress) and rows(results), in the order of the page.
_SECTIONS: tuple[Any, ...] = (rewrite_time, expert_step, dora_step, merge_error)

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
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    parts = [f"{_HEAD}\n{facts}\n"]
    for section in _SECTIONS:
        table = _table(*section.rows(section.run(repeats=repeats, progress=progress)))
        parts.append(f"## {section.TITLE}\n\n{section.caption()}\n\n{table}\n")
    page = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return page


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
