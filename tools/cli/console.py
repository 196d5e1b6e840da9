"""Where the command line writes: results to stdout, all else to stderr.

Without a terminal there is no color, no bar, and no wrapping of lines at 80 columns.
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
"""(done, total, what is being done): what :func:`progress` gives and the library takes."""

_WIDE = 160


def output() -> Console:
    """The console for results, on what ``sys.stdout`` is now."""
    return _console(sys.stdout)


def error_console() -> Console:
    """The console for errors, warnings and progress, on what ``sys.stderr`` is now."""
    return _console(sys.stderr)


def say(text: str, style: str = "", *, to: Console | None = None) -> None:
    """Prints text as it is: nothing in it is markup, and long lines stay whole."""
    (to or output()).print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def say_json(value: Any) -> None:
    """Prints a value as JSON, or a text that is JSON as it is."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def say_error(message: str) -> None:
    """One red message."""
    text = Text.assemble(("error: ", "bold red"), (message, "red"))
    error_console().print(text, soft_wrap=True, highlight=False)


def table(
    *headings: str, rows: Iterable[Iterable[RenderableType]] = (), right: Collection[str] = ()
) -> Table:
    """Makes a table. ``right`` names the columns that are aligned right; text in cells is not markup."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(one) if isinstance(one, str) else one for one in row))
    return made


def facts(rows: Iterable[tuple[str, RenderableType]], style: str) -> Table:
    """Makes a grid of labels, in a style, and values."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style=style, no_wrap=True)
    made.add_column(overflow="fold")
    for label, said in rows:
        made.add_row(label, Text(said) if isinstance(said, str) else said)
    return made


def log_to_stderr(*, debug: bool = False) -> None:
    """Shows what the library logs: warnings, and all of it for debugging."""
    log = logging.getLogger("lora_fx")
    for handler in [one for one in log.handlers if isinstance(one, RichHandler)]:
        log.removeHandler(handler)
    log.addHandler(RichHandler(console=error_console(), show_path=debug, show_time=debug))
    log.setLevel(logging.DEBUG if debug else logging.WARNING)


@contextlib.contextmanager
def progress(title: str, console: Console | None = None) -> Iterator[Advance]:
    """A bar that goes away when the work is done; nothing without a terminal.

    Args:
        title: What is being done.
        console: Where to; that for errors by default. Give the one that is printed on meanwhile.
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

        def advance(done: int, total: int, what: str = "") -> None:
            shown.update(task, completed=done, total=total, what=what[-40:])

        yield advance


@contextlib.contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar for a known number of named stages: call it as each one begins."""
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
