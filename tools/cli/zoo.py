"""``lora-fx zoo``: the whole job on every model of the zoo."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.errors import ConfigError
from lora_fx.tools.cli import console
from lora_fx.tools.zoo.report import PARTS, Row

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
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Keep all rows in this file, JSON: rows of models that do not run stay, and without "
            "exports what it knows of them. zoo.json beside the page by default."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out models that --rows has all asked parts of.")
    ] = False,
    since: Annotated[
        str, typer.Option(help="With --resume: only if they are of this day (2026-11-30) or later.")
    ] = "",
) -> None:
    """Rewrite, train, merge and export every model of the zoo, and write the page."""
    from lora_fx.tools.zoo.registry import ENTRIES, select
    from lora_fx.tools.zoo.report import exceptions, page, summary, table
    from lora_fx.tools.zoo.runner import Options, run_jobs

    entries = select(only, group)
    needed = {entry.name.partition("/")[0] for entry in entries} & set(_NEEDED)
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise ConfigError(f"the zoo needs {', '.join(missing)}: pip install 'lora-fx[zoo]'")
    target = out or (_DEFAULT if only is None and group is None else None)
    store = rows or (target.with_suffix(".json") if target is not None else None)
    if resume and store is None:
        raise ConfigError("--resume goes on from a file of rows: name it with --rows")
    log = console.error_console()
    known = {} if store is None else _read(store)
    asked = PARTS if onnx else PARTS[:1]

    def is_done(row: Row) -> bool:
        return resume and all(row.dates.get(part, "") >= (since or "0") for part in asked)

    def tell(row: Row) -> None:
        problems = "; ".join(exceptions([row])) or f"{row.name}: as it should be"
        log.print(f"{problems} ({row.total_seconds:.1f} s)", markup=False, highlight=False)
        if not onnx and row.name in known:
            row = row.with_export_of(known[row.name])
        known[row.name] = row
        if store is not None:
            _write(store, [known[entry.name] for entry in ENTRIES if entry.name in known])

    left = [one for one in entries if one.name not in known or not is_done(known[one.name])]
    with console.progress("zoo", log) as advance:
        run_jobs(left, Options(jobs, timeout, onnx), advance, tell)
    chosen = [known[entry.name] for entry in entries]
    screen = console.output()
    lines = [*table(chosen), "", *exceptions(chosen), "", *summary(chosen)]
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        every = [known[entry.name] for entry in ENTRIES if entry.name in known]
        target.write_text(page(every), encoding="utf-8")
        screen.print(f"written to {target}")


def _write(store: Path, rows: Sequence[Row]) -> None:
    """A row a line, so that a difference of two files says which models changed."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    store.parent.mkdir(parents=True, exist_ok=True)
    new = store.with_name(f".{store.name}.new")
    new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    new.replace(store)


def _read(store: Path) -> dict[str, Row]:
    try:
        found = [Row(**values) for values in json.loads(store.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{store} does not hold rows of this zoo: {error}") from error
    return {row.name: row for row in found}
