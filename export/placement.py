"""Writing beside the target and moving into place, so that a file is whole or not there at all.

A model with external data is two files, and no file system replaces two at once. The data file
therefore gets a name of its own at every export: the model file names its data file, and replacing
the model file, one atomic step, is what switches from the old pair to the new one. A companion, the
encoder that belongs to a decoder, is named and switched in the same way.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.errors import ExportError

__all__ = ["Staging", "check_target", "staging", "write_errors"]


class Staging:
    """A temporary folder beside ``target`` in which its successor is written.

    Attributes:
        target: Where the model file goes.
        model: The model file to write, under the name it will have.
        data: The external data file to write, if there is to be one.
        companions: What is moved along, before the model file.
    """

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        self.model = folder / target.name
        self.data = folder / f"{target.name}.{secrets.token_hex(4)}.data"
        self.companions: list[Staging] = []

    def companion(self, name: str) -> Staging:
        """A further model file that belongs to this one, ``STEM.xxxxxxxx.NAME.onnx`` beside it."""
        file = f"{self.target.stem}.{secrets.token_hex(4)}.{name}{self.target.suffix}"
        staged = Staging(self.target.with_name(file), self.model.parent)
        self.companions.append(staged)
        return staged

    def commit(self, *, force: bool) -> None:
        """Move what was written into place and delete the files beside it that it replaces.

        Raises:
            ExportError: The target came into being meanwhile, or cannot be written.
        """
        check_target(self.target, force=force)
        stale = self._replaced()
        *beside, model = self._written()
        moved: list[Path] = []
        with write_errors(self.target):
            for path in (*beside, model):
                _flush(path)
            try:
                for path in beside:
                    # One by one: what was moved before an error has to be known.
                    moved.append(path.replace(self.target.with_name(path.name)))  # noqa: PERF401
                model.replace(self.target)
            except OSError:
                for path in moved:
                    path.unlink(missing_ok=True)
                raise
            for path in stale:
                path.unlink(missing_ok=True)

    def _written(self) -> Iterator[Path]:
        for companion in self.companions:
            yield from companion._written()
        if self.data.exists():
            yield self.data
        yield self.model

    def _replaced(self) -> list[Path]:
        data = r"\.[0-9a-f]{8}\.data"
        name, stem, suffix = map(
            re.escape, (self.target.name, self.target.stem, self.target.suffix)
        )
        ours = re.compile(rf"{name}{data}|{stem}\.[0-9a-f]{{8}}\.[a-z]+{suffix}({data})?")
        return [path for path in self.target.parent.iterdir() if ours.fullmatch(path.name)]


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that is a folder, or that exists unless ``force`` is given.

    Raises:
        ExportError: With the path and the remedy.
    """
    if target.is_dir():
        raise ExportError(f"{target} is a folder: give the name of the file to write in it")
    if not force and os.path.lexists(target):
        raise ExportError(
            f"{target} exists: pass force=True (--force) to replace it, or give another name"
        )


@contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """A folder beside ``target`` that is gone afterwards, whatever happens.

    Raises:
        ExportError: The folder of the target cannot be made or written to.
    """
    # The same folder, hence the same file system: only there is a move atomic.
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield Staging(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_errors(target: Path, size: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the file system into an ExportError that says what is still there.

    Args:
        target: The file being written.
        size: Bytes that it needs, for the message.

    Raises:
        ExportError: Chained from the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        kept = "; the file that was there is untouched" if os.path.lexists(target) else ""
        if not _is_full(error):
            reason = error.strerror or str(error)
            raise ExportError(f"cannot write {target}: {reason}{kept}") from error
        need = f", {size / 1e6:.0f} MB are needed" if size else ""
        raise ExportError(
            f"the disk is full: cannot write {target}{need}{kept}; "
            f"free some space or write to another disk"
        ) from error


def _is_full(error: OSError) -> bool:
    # numpy, which writes external data, reports a short write without an errno.
    short = error.errno is None and "requested and" in str(error)
    return short or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _flush(path: Path) -> None:
    # Without it a crash soon after the move can leave a file of the right name and no content.
    with path.open("rb") as file:
        os.fsync(file.fileno())
