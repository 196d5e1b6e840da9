"""``lora-fx bench``: measures and writes the page of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.tools import console
from lora_fx.tools.bench.report import run_benchmarks

__all__ = ["bench"]


def bench(
    out: Annotated[Path, typer.Option(help="The Markdown page to write; it is replaced.")] = Path(
        "docs/benchmarks.md"
    ),
    repeats: Annotated[int, typer.Option(min=2, help="Counted runs of each contender.")] = 10,
) -> None:
    """Measure rewrites and training steps beside PEFT and write the page."""
    with console.progress("measuring") as advance:
        page = run_benchmarks(out, repeats=repeats, progress=advance)
    console.output().print(page, markup=False, highlight=False)
    console.output().print(f"written to {out}")
