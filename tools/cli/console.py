"""Where the command line writes: results to stdout, all else to stderr.

Without a terminal there is no color, no bar, and no wrapping of lines at 80 columns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

__all__ = ["Advance", "error_console", "log_to_stderr", "output", "progress", "say_error", "steps"]

Advance = Callable[[int, int, str], None]
"""(done, total, what is being done): what :func:`progress` gives and the library takes."""

_WIDE = 160


def output() -> Console:
    """The console for results, on what ``sys.stdout`` is now."""
    return _console(sys.stdout)


def error_console() -> Console:
    """The console for errors, warnings and progress, on what ``sys.stderr`` is now."""
    return _console(sys.stderr)


def say_error(message: str) -> None:
    """One red message."""
    text = Text.assemble(("error: ", "bold red"), (message, "red"))
    error_console().print(text, soft_wrap=True, highlight=False)


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
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
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
