"""The folder in which an export is written, and memory for the weights that it creates.

These are merged weights and those of another precision. A model that fills the machine's memory leaves no
room for a second one. So what goes beyond a small allowance is kept in files in the staging folder,
mapped into memory: the system writes them out when memory runs short and reads them back when they are
used.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import glob
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError, some
from lora_fx.export.report import size_text
from lora_fx.files import flush

if TYPE_CHECKING:
    import onnx_ir as ir


__all__ = [
    "EXTERNAL_DATA_BYTES",
    "SHARD_BYTES",
    "Scratch",
    "Staging",
    "abandoned",
    "check_target",
    "owned",
    "staging",
    "write",
    "write_errors",
]


try:
    import fcntl as _fcntl
except ImportError:  # Windows: folders of processes that died stay there
    _locks: Any = None
else:
    _locks = _fcntl


_LOCK = "in-use.lock"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which no other process uses."""
    if _locks is None:
        yield
        return
    # It gets its name when it is locked: under that name it is never free while its owner lives.
    unnamed = folder / f"{_LOCK}.new"
    with unnamed.open("wb") as file:
        _locks.flock(file, _locks.LOCK_EX)
        unnamed.rename(folder / _LOCK)
        yield


def abandoned(folder: Path) -> bool:
    """Whether the process that held the lock of ``folder`` is gone; False for one without a lock."""
    if _locks is None:
        return False
    try:
        with (folder / _LOCK).open("rb+") as file:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError:  # held, or no such file
        return False
    return True


_log = logging.getLogger("lora_fx")

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class Staging:
    """A temporary folder next to ``target``, in which the new file is written.

    Attributes:
        target: Where the model file goes.
        folder: The temporary folder.
        model: The model file to write, under the name it will have.
        data: The external data file to write, if there is to be one; several have
            ``-00001-of-00003`` before the suffix.
        companions: What is moved along, before the model file.
        extras: Other files of the folder to the place of each; made by the code that fills it in.
    """

    def __init__(self, target: Path, folder: Path, data: str | None = None) -> None:
        self.target = target
        self.folder = folder
        self.model = folder / target.name
        # A digit first: onnx-ir would put the number of a file before what looks like a suffix.
        token = f"{secrets.randbelow(10)}{secrets.token_hex(4)[1:]}"
        self.data = folder / (data or f"{target.name}.{token}.data")
        self.companions: list[Staging] = []
        self.extras: dict[Path, Path] = {}

    def companion(self, name: str) -> Staging:
        """A further model file that belongs to this one: ``STEM.xxxxxxxx.NAME.onnx`` in the same folder."""
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
        """Delete what was written of this model, so that it can be written again."""
        for file in self.written():
            file.unlink(missing_ok=True)

    def commit(self, *, force: bool) -> None:
        """Move what was written into place and delete the files that it replaces.

        Raises:
            ExportError: The target came into being meanwhile, or cannot be written.
        """
        check_target(self.target, force=force)
        self._check_extras(force=force)
        stale = self._replaced()
        folder = self.target.parent
        beside = [*self.belonging(), *self.extras]
        moved = [self.extras.get(file, folder / file.name) for file in beside]
        kept: dict[Path, Path] = {}
        with write_errors(self.target):
            try:
                # On the disk before anything refers to it: a crash of the machine soon after a
                # move can otherwise leave a file of the right name and no content.
                for file in (self.model, *beside):
                    flush(file)
                for number, (file, place) in enumerate(zip(beside, moved, strict=True)):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    if place.exists():
                        kept[place] = self.folder / f"kept-{number}"
                        shutil.copy2(place, kept[place])
                    file.replace(place)
                _flush_folder(folder)
                self.model.replace(self.target)
            except BaseException:
                # Interrupts, too. Once the model has moved, the others belong to it.
                if self.model.exists():
                    for place in moved:
                        if place in kept:
                            kept[place].replace(place)
                        else:
                            place.unlink(missing_ok=True)
                raise
        # The new model is there: what fails from here on is no failure of the export.
        for path in stale:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("cannot delete %s, which no model uses any more: %s", path, error)
        _flush_folder(folder)

    def _check_extras(self, *, force: bool) -> None:
        """Without ``force`` a file beside the model may be one more of the same content, and no other."""
        other = [
            place
            for file, place in self.extras.items()
            if place.exists() and not (place.is_file() and filecmp.cmp(file, place, shallow=False))
        ]
        if other and not force:
            raise ExportError(
                f"{some([str(one) for one in other])} exists with another content: pass force=True (--force) "
                "to replace it, or give another folder"
            )

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
def staging(target: Path, data: str | None = None) -> Iterator[Staging]:
    """A folder next to ``target``, which is deleted afterwards in any case.

    Args:
        target: The model file.
        data: The name of its file of weights; None for one that no other file has.

    Raises:
        ExportError: The folder of the target cannot be made or written to.
    """
    # The same folder, hence the same file system: only there is a move atomic.
    prefix = f".{target.name}."
    missing = [one for one in target.parents if not one.exists()]
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in target.parent.glob(f"{glob.escape(prefix)}*"):
            if abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with owned(folder):
            yield Staging(target, folder, data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Folders that were made for a file that was not written.
        for one in missing:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()


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


def _flush_folder(path: Path) -> None:
    # Windows opens no folders, and some network file systems flush none: a move is as safe there
    # as they make it.
    try:
        flush(path)
    except OSError as error:
        _log.debug("cannot flush %s: %s", path, error)


# Bytes of weights from which they go into a file of their own. A model file with weights inside is
# put together in memory, twice over; weights in files of their own are written one by one.
EXTERNAL_DATA_BYTES = 256 * 1024**2

# Bytes of one file of weights: what every file system and download takes.
SHARD_BYTES = 4_000_000_000

_PROTO_BYTES = 2**31 - 1  # what a protobuf message can hold
_PAGE = 65536  # of every system: weights on page boundaries can be mapped into memory


def write(
    model: ir.Model, stage: Staging, limit: int = EXTERNAL_DATA_BYTES, shard: int = SHARD_BYTES
) -> dict[str, int]:
    """Write the files of a model.

    Weights in files of their own are written one after the other: beside the weights themselves,
    which are the model's, no more than one of them is in memory.

    Args:
        model: The graph with its weights.
        stage: Where to.
        limit: Bytes of weights from which they go into files of their own.
        shard: Bytes of one such file. A weight that is larger has a file for itself.

    Returns:
        Name to bytes of every file, the model first.

    Raises:
        ExportError: The disk is full or cannot be written to, or the weights fit in no model file
            and ``limit`` asks for that.
    """
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = size > limit
    if not external and size >= _PROTO_BYTES:
        raise ExportError(
            f"{size / 1e9:.1f} GB of weights do not fit into the model file, which ends at 2 GB: "
            f"give a smaller external_data_bytes"
        )
    with write_errors(stage.target, size):
        if external:
            ir.save(
                model,
                stage.model,
                external_data=stage.data.name,
                max_shard_size_bytes=shard,
                alignment=_PAGE,
            )
        else:
            ir.save(model, stage.model)
        return {file.name: file.stat().st_size for file in stage.written()}


_ALLOWANCE_BYTES = 256 * 1024**2


@dataclass
class Scratch:
    """Takes tensors out of memory.

    Args:
        stage: Whose folder the files go to.
        allowance: Bytes that may stay in memory.
    """

    stage: Staging
    allowance: int = _ALLOWANCE_BYTES

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or once the allowance is used up its values in a mapped file.

        Raises:
            ExportError: The disk is full or cannot be written to.
        """
        if tensor.device.type != "cpu":
            return tensor
        if tensor.nbytes <= self.allowance:
            self.allowance -= tensor.nbytes
            return tensor
        with write_errors(self.stage.target, tensor.nbytes):
            return _mapped(tensor, self.stage.folder)


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        # The blocks first: where the disk has none left, writing to the map would kill the process.
        _reserve(descriptor, tensor.nbytes)
        storage = torch.UntypedStorage.from_file(name, True, tensor.nbytes)
    finally:
        os.close(descriptor)
        # What is mapped stays until the last tensor is gone. Windows deletes no open file: there
        # the staging folder goes later.
        with contextlib.suppress(PermissionError):
            Path(name).unlink()
    values: Tensor = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
    return values.copy_(tensor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1024**2)
    for start in range(0, size, len(zeros)):
        os.write(descriptor, zeros[: size - start])
