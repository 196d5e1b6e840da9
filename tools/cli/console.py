"""Output of the command line: results to stdout, all else to stderr.

Without a terminal there are no colors and no bars, and lines are not wrapped at 80 columns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import IO, Any

from rich import box
from rich import progress as bars
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

__all__ = [
    "Advance",
    "error_console",
    "facts",
    "log_to_stderr",
    "output",
    "progress",
    "say",
    "say_error",
    "say_json",
    "steps",
    "table",
]

Advance = Callable[[int, int, str], None]
"""Callback with (done, total, current work), which :func:`progress` yields and the library calls."""

_WIDE = 160


def output() -> Console:
    """Return the console for results, on the current ``sys.stdout``."""
    return _console(sys.stdout)


def error_console() -> Console:
    """Return the console for errors, warnings and progress, on the current ``sys.stderr``."""
    return _console(sys.stderr)


def say(text: str, style: str = "", *, to: Console | None = None) -> None:
    """Print text as it is, without markup and without wrapping long lines."""
    (to or output()).print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def say_json(value: Any) -> None:
    """Print a value as JSON, or a text that is already JSON."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def say_error(message: str) -> None:
    """Print an error message in red."""
    text = Text.assemble(("error: ", "bold red"), (message, "red"))
    error_console().print(text, soft_wrap=True, highlight=False)


def table(
    *headings: str, rows: Iterable[Iterable[RenderableType]] = (), right: Collection[str] = ()
) -> Table:
    """Return a table. ``right`` names the right-aligned columns. Text in cells is not markup."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        grid.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def facts(rows: Iterable[tuple[str, RenderableType]], style: str) -> Table:
    """Return a table without borders: a label and a value in each row. The labels have a style."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style=style, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, Text(value) if isinstance(value, str) else value)
    return grid


def log_to_stderr(*, debug: bool = False) -> None:
    """Show the library's log on stderr: warnings, or everything for debugging."""
    log = logging.getLogger("lora_fx")
    for handler in [known for known in log.handlers if isinstance(known, RichHandler)]:
        log.removeHandler(handler)
    log.addHandler(RichHandler(console=error_console(), show_path=debug, show_time=debug))
    log.setLevel(logging.DEBUG if debug else logging.WARNING)


@contextlib.contextmanager
def progress(title: str, console: Console | None = None) -> Iterator[Advance]:
    """Show a progress bar until the work is done. Without a terminal, show nothing.

    Args:
        title: Title of the work.
        console: Console of the bar; by default the console for errors. If other output is printed while the
            bar is shown, pass its console.
    """
    console = console or error_console()
    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("[dim]{task.fields[what]}"),
    )
    hidden = not console.is_terminal
    with bars.Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        task = shown.add_task(title, total=None, what="")

        def advance(done: int, total: int, detail: str = "") -> None:
            shown.update(task, completed=done, total=total, what=detail[-40:])

        yield advance


@contextlib.contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar for a known number of stages. Call the yielded function when a stage begins."""
    done = 0
    with progress(title) as advance:

        def begin(stage: str) -> None:
            nonlocal done
            advance(min(done, total), total, stage)
            done += 1

        yield begin


def _console(file: IO[str]) -> Console:
    if file.isatty():
        return Console(file=file)
    columns = os.environ.get("COLUMNS", "")
    return Console(file=file, width=int(columns) if columns.isdigit() else _WIDE)
