"""Python's collector of garbage, which finds nothing while modules load or a model is rewritten."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector within the context.

    Modules, classes and graphs stay. But as they are many new objects, the collector would look through all
    objects of the process. With PyTorch and transformers loaded, that takes 0.2 s.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
