"""Runs the benchmarks and writes ``docs/benchmarks.md``. Nobody edits that file by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lora_fx.tools.bench import dora_step, expert_step, rewrite_time
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
    facts = "\n".join(f"- {name}: {value}" for name, value in machine().items())
    rewriting = _table(*rewrite_time.rows(rewrite_time.run(repeats=repeats, progress=progress)))
    experts = _table(*expert_step.rows(expert_step.run(repeats=repeats, progress=progress)))
    decomposed = _table(*dora_step.rows(dora_step.run(repeats=repeats, progress=progress)))
    page = (
        f"{_HEAD}\n{facts}\n\n## {rewrite_time.TITLE}\n\n{rewriting}\n\n"
        f"## {expert_step.TITLE}\n\n{expert_step.caption()}\n\n{experts}\n\n"
        f"## {dora_step.TITLE}\n\n{dora_step.caption()}\n\n{decomposed}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return page


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
