"""``lora-fx zoo``: the whole job on every model of the zoo."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.errors import ConfigError
from lora_fx.tools import console
from lora_fx.tools.zoo.row import Row

__all__ = ["zoo"]

_DEFAULT = Path("docs/zoo.md")
_NEEDED = ("diffusers", "timm", "torchvision", "transformers")


def zoo(
    only: Annotated[
        str | None, typer.Option(help="A part of the names to run, or a pattern with * and ?.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="A group, or the beginning of its name.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models at a time.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one model may take.")] = 300,
    onnx: Annotated[
        bool, typer.Option(help="Whether to export; most of the time goes there.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help=f"The page to write; {_DEFAULT} if the whole zoo runs, else none."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write the rows as JSON, too, each as it is done.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take the rows that --results holds already.")
    ] = False,
) -> None:
    """Rewrite, train, merge and export every model of the zoo, and write the page."""
    from lora_fx.tools.zoo.registry import select
    from lora_fx.tools.zoo.report import exceptions, page, summary, table
    from lora_fx.tools.zoo.runner import Options, run_jobs

    if resume and results is None:
        raise ConfigError("--resume goes on from a file of rows: name it with --results")
    entries = select(only, group)
    needed = {entry.name.partition("/")[0] for entry in entries} & set(_NEEDED)
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise ConfigError(f"the zoo needs {', '.join(missing)}: pip install 'lora-fx[zoo]'")
    log = console.error_console()
    done = _read(results) if resume and results is not None else {}

    def tell(row: Row) -> None:
        problems = "; ".join(exceptions([row])) or f"{row.name}: as it should be"
        log.print(f"{problems} ({row.total_seconds:.1f} s)", markup=False, highlight=False)
        done[row.name] = row
        if results is not None:
            found = [dataclasses.asdict(one) for one in done.values()]
            results.write_text(json.dumps(found, indent=1), encoding="utf-8")

    left = [entry for entry in entries if entry.name not in done]
    with console.progress("zoo", log) as advance:
        run_jobs(left, Options(jobs, timeout, onnx), advance, tell)
    rows = [done[entry.name] for entry in entries]
    whole = only is None and group is None and onnx
    target = out or (_DEFAULT if whole else None)
    screen = console.output()
    lines = [*table(rows), "", *exceptions(rows), "", *summary(rows)]
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(rows), encoding="utf-8")
        screen.print(f"written to {target}")


def _read(results: Path) -> dict[str, Row]:
    try:
        found = [Row(**values) for values in json.loads(results.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{results} does not hold rows of this zoo: {error}") from error
    return {row.name: row for row in found}
