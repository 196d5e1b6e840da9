"""Writing beside the target and moving into place, so that a file is whole or not there at all.

A model with external data is several files, and no file system replaces two at once. The data files
therefore get names of their own at every export: the model file names its data files, and replacing
the model file, one atomic step, is what switches from the old set to the new one. A companion, the
encoder that belongs to a decoder, is named and switched in the same way, with data of its own. A
process that dies before that step leaves the old model and what belongs to it; after it, the new
ones. What it leaves beside them (a folder that nobody writes to any more, files that no model names)
is cleared by the next export to the same name.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.errors import ExportError
from lora_fx.export.ownership import abandoned, owned
from lora_fx.export.stored_format import size_text

__all__ = ["Staging", "check_target", "staging", "write_errors"]

_log = logging.getLogger("lora_fx")

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class Staging:
    """A temporary folder beside ``target`` in which its successor is written.

    Attributes:
        target: Where the model file goes.
        folder: The temporary folder.
        model: The model file to write, under the name it will have.
        data: The external data file to write, if there is to be one; several have
            ``-00001-of-00003`` before the suffix.
        companions: What is moved along, before the model file.
    """

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.model = folder / target.name
        # A digit first: onnx-ir would put the number of a file before what looks like a suffix.
        token = f"{secrets.randbelow(10)}{secrets.token_hex(4)[1:]}"
        self.data = folder / f"{target.name}.{token}.data"
        self.companions: list[Staging] = []

    def companion(self, name: str) -> Staging:
        """A further model file that belongs to this one, ``STEM.xxxxxxxx.NAME.onnx`` beside it."""
        file = f"{self.target.stem}.{secrets.token_hex(4)}.{name}{self.target.suffix}"
        staged = Staging(self.target.with_name(file), self.folder)
        self.companions.append(staged)
        return staged

    def written(self) -> list[Path]:
        """The files of this model that are there: the model first, then its data."""
        data = self.folder.glob(f"{glob.escape(self.data.stem)}*{self.data.suffix}")
        return [self.model, *sorted(data)]

    def belonging(self) -> list[Path]:
        """All files that are there but the model: those of its companions, and its data."""
        _, *data = self.written()
        return [file for one in self.companions for file in one.written()] + data

    def has_data(self) -> bool:
        """Whether weights of this model or of a companion are in files of their own."""
        return any(file.suffix == self.data.suffix for file in self.belonging())

    def discard(self) -> None:
        """Delete what was written of this model, so that it can be written anew."""
        for file in self.written():
            file.unlink(missing_ok=True)

    def commit(self, *, force: bool) -> None:
        """Move what was written into place and delete the files beside it that it replaces.

        Raises:
            ExportError: The target came into being meanwhile, or cannot be written.
        """
        check_target(self.target, force=force)
        stale = self._replaced()
        folder = self.target.parent
        beside = self.belonging()
        moved = [folder / file.name for file in beside]
        with write_errors(self.target):
            try:
                # On the disk before anything refers to it: a crash of the machine soon after a
                # move can otherwise leave a file of the right name and no content.
                for file in (self.model, *beside):
                    _flush(file)
                for file, place in zip(beside, moved, strict=True):
                    file.replace(place)
                _flush_folder(folder)
                self.model.replace(self.target)
            except BaseException:
                # Interrupts, too. Once the model has moved, the others belong to it.
                if self.model.exists():
                    for place in moved:
                        place.unlink(missing_ok=True)
                raise
        # The new model is there: what fails from here on is no failure of the export.
        for path in stale:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("cannot delete %s, which no model uses any more: %s", path, error)
        _flush_folder(folder)

    def _replaced(self) -> list[Path]:
        data = r"\.[0-9a-f]{8}(-\d{5}-of-\d{5})?\.data"
        name, stem, suffix = map(
            re.escape, (self.target.name, self.target.stem, self.target.suffix)
        )
        ours = re.compile(rf"{name}{data}|{stem}\.[0-9a-f]{{8}}\.[a-z]+{suffix}({data})?")
        return [path for path in self.target.parent.iterdir() if ours.fullmatch(path.name)]


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that has become a folder, or that exists unless ``force`` is given.

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
    prefix = f".{target.name}."
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in target.parent.glob(f"{glob.escape(prefix)}*"):
            if abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with owned(folder):
            yield Staging(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_errors(target: Path, size: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the file system into an ExportError that says what is still there.

    Args:
        target: The file being written.
        size: Bytes that it takes, for the message.

    Raises:
        ExportError: Chained from the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        kept = "; the file that was there is untouched" if os.path.lexists(target) else ""
        if not _is_full(error):
            reason = error.strerror or str(error)
            remedy = "; choose a folder that you may write to" if error.errno in _DENIED else ""
            raise ExportError(f"cannot write {target}: {reason}{kept}{remedy}") from error
        need = f", which takes {size_text(size)}" if size else ""
        raise ExportError(
            f"the disk is full: cannot write {target}{need}{kept}; "
            f"free some space or write to another disk"
        ) from error


def _is_full(error: OSError) -> bool:
    # numpy, which writes external data, reports a short write without an errno.
    short = error.errno is None and "requested and" in str(error)
    return short or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    # Windows opens no folders, and some network file systems flush none: a move is as safe there
    # as they make it.
    try:
        _flush(path)
    except OSError as error:
        _log.debug("cannot flush %s: %s", path, error)
