"""Progress of long operations: a bar in the terminal, or a callback."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from lora_fx.extras import is_installed

__all__ = ["Progress", "Tell", "show_progress"]

Tell: TypeAlias = Callable[[int, int, str], None]
"""A callback for the number of items done, the total (0 if unknown), and the name of the current item."""

Progress: TypeAlias = bool | Tell | None
"""True for a bar of tqdm, if it is installed; or a callback."""


@contextmanager
def show_progress(progress: Progress, unit: str) -> Iterator[Tell]:
    """Yield the callback that reports progress within the context.

    Args:
        progress: The caller's choice.
        unit: The noun for the bar, as "weight".
    """
    if callable(progress):
        yield progress
    elif not progress or not is_installed("tqdm"):
        yield lambda done, total, name: None
    else:
        with importlib.import_module("tqdm").tqdm(unit=unit) as bar:

            def tell(done: int, total: int, name: str) -> None:
                bar.total = max(total, done + 1) if total else None
                bar.set_description(name, refresh=False)
                bar.update(done - bar.n)

            yield tell
            bar.update((bar.total or bar.n) - bar.n)
