"""Whether the process that made a temporary folder is still at work in it.

A lock of the operating system on a file in the folder says so: it goes with the process, however
that ends, and unlike a process id it means the same in every container that sees the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows: folders of processes that died stay there
    _locks: Any = None
else:
    _locks = _fcntl

__all__ = ["abandoned", "owned"]

_LOCK = "in-use.lock"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which no other process uses."""
    if _locks is None:
        yield
        return
    # It gets its name when it is locked: under that name it is never free while its owner lives.
    unnamed = folder / f"{_LOCK}.new"
    with unnamed.open("w") as file:
        _locks.flock(file, _locks.LOCK_EX)
        unnamed.rename(folder / _LOCK)
        yield


def abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of ``folder`` any more. One without a lock is not known."""
    if _locks is None:
        return False
    try:
        with (folder / _LOCK).open("r+") as file:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError:  # held, or no such file
        return False
    return True
