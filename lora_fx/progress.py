"""Progress of long work: a bar in the terminal, or a function of the caller's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from lora_fx.extras import is_installed

__all__ = ["Progress", "Tell", "show_progress"]

Tell: TypeAlias = Callable[[int, int, str], None]
"""Is called with how many are done, of how many (0 if that is not known), and what is being done."""

Progress: TypeAlias = bool | Tell | None
"""True for a bar of tqdm, if that is installed; or a function that is told."""


@contextmanager
def show_progress(progress: Progress, unit: str) -> Iterator[Tell]:
    """Give the function that work tells how far it is, for as long as the context lasts.

    Args:
        progress: What the caller wants.
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
