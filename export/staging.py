"""The staging folder of an export, and memory for its new weights.

New weights are merged weights and weights of another precision. A model may fill the machine's memory and
leave no room for a second one. So weights that can be computed again take no memory
(:mod:`lora_fx.export.deferred`). Others beyond a small allowance go into files in the staging folder that are
mapped into memory. The system writes them out when memory runs short and reads them back on use.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError, OutputPathError, some
from lora_fx.export.deferred import Deferred
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
    "in_use",
    "owned",
    "staging",
    "write",
    "write_errors",
]


try:
    import fcntl as _fcntl
except ImportError:  # Windows: folders of dead processes are not removed
    _locks: Any = None
else:
    _locks = _fcntl


_LOCK = "in-use.lock"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Lock ``folder`` inside the block, so that other processes see that the folder is in use."""
    if _locks is None:
        yield
        return
    # The file is renamed after it is locked. So a file of the final name is locked while its owner lives.
    unnamed = folder / f"{_LOCK}.new"
    with unnamed.open("wb") as file:
        _locks.flock(file, _locks.LOCK_EX)
        unnamed.rename(folder / _LOCK)
        yield


def abandoned(folder: Path) -> bool:
    """Return True if the process that held the lock of ``folder`` is gone. False if there is no lock."""
    if _locks is None:
        return False
    try:
        with (folder / _LOCK).open("rb+") as file:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError:  # locked, or no such file
        return False
    return True


def in_use(folder: Path) -> bool:
    """Return True if a process holds the lock of ``folder``. False if there is no lock."""
    return _locks is not None and (folder / _LOCK).exists() and not abandoned(folder)


_log = logging.getLogger("lora_fx")

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class Staging:
    """Temporary folder next to ``target``, in which the new file is written.

    Attributes:
        target: Destination of the model file.
        folder: The temporary folder.
        model: The model file to write, under its final name.
        data: The external data file to write, if any. Several files have ``-00001-of-00003`` before the
            suffix.
        companions: Further model files, which are moved before this one.
        extras: Map from other files in the folder to their destinations. The code of a target sets it.
    """

    def __init__(self, target: Path, folder: Path, data: str | None = None) -> None:
        self.target = target
        self.folder = folder
        self.model = folder / target.name
        # The token begins with a digit. Else onnx-ir takes it for a suffix, and puts the number of a file
        # before it.
        token = f"{secrets.randbelow(10)}{secrets.token_hex(4)[1:]}"
        self.data = folder / (data or f"{target.name}.{token}.data")
        self.companions: list[Staging] = []
        self.extras: dict[Path, Path] = {}

    def companion(self, name: str) -> Staging:
        """Add a model file that belongs to this one: ``STEM.xxxxxxxx.NAME.onnx`` in the same folder."""
        file = f"{self.target.stem}.{secrets.token_hex(4)}.{name}{self.target.suffix}"
        staged = Staging(self.target.with_name(file), self.folder)
        self.companions.append(staged)
        return staged

    def written(self) -> list[Path]:
        """Return the written files of this model: the model first, then its data."""
        data = self.folder.glob(f"{glob.escape(self.data.stem)}*{self.data.suffix}")
        return [self.model, *sorted(data)]

    def belonging(self) -> list[Path]:
        """Return the files that the model file needs: those of its companions, and its own data files."""
        _, *data = self.written()
        return [file for companion in self.companions for file in companion.written()] + data

    def has_data(self) -> bool:
        """Return True if weights of this model or of a companion are in separate files."""
        return any(file.suffix == self.data.suffix for file in self.belonging())

    def discard(self) -> None:
        """Delete the written files of this model, so that it can be written again."""
        for file in self.written():
            file.unlink(missing_ok=True)

    def commit(self, *, force: bool | None) -> None:
        """Move the written files to their destinations and delete the files that they replace.

        Raises:
            ExportError: The target was created meanwhile, or cannot be written.
        """
        check_target(self.target, force=force)
        self._check_extras(force=force)
        stale = self._replaced()
        folder = self.target.parent
        files = [*self.belonging(), *self.extras]
        destinations = [self.extras.get(file, folder / file.name) for file in files]
        kept: dict[Path, Path] = {}
        with write_errors(self.target):
            try:
                # Flush before the move. Otherwise a crash of the machine soon after it can leave a
                # file of the right name without content.
                for file in (self.model, *files):
                    flush(file)
                for number, (file, destination) in enumerate(zip(files, destinations, strict=True)):
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    if destination.exists():
                        kept[destination] = self.folder / f"kept-{number}"
                        shutil.copy2(destination, kept[destination])
                    file.replace(destination)
                _flush_folder(folder)
                self.model.replace(self.target)
            except BaseException:
                # Interrupts are handled, too. Once the model has moved, its other files must stay.
                if self.model.exists():
                    for destination in destinations:
                        if destination in kept:
                            kept[destination].replace(destination)
                        else:
                            destination.unlink(missing_ok=True)
                raise
        # The new model is in place, so errors from here on do not fail the export.
        for path in stale:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("cannot delete %s, which no model uses any more: %s", path, error)
        _flush_folder(folder)

    def _check_extras(self, *, force: bool | None) -> None:
        """Raise without ``force`` if an extra file would replace a file of different content."""
        different = [
            path
            for file, path in self.extras.items()
            if path.exists() and not (path.is_file() and filecmp.cmp(file, path, shallow=False))
        ]
        if different and not force:
            raise ExportError(
                f"{some([str(path) for path in different])} exists with another content: pass force=True "
                "(--force) to replace it, or give another folder"
            )

    def _replaced(self) -> list[Path]:
        data = r"\.[0-9a-f]{8}(-\d{5}-of-\d{5})?\.data"
        name, stem, suffix = map(
            re.escape, (self.target.name, self.target.stem, self.target.suffix)
        )
        ours = re.compile(rf"{name}{data}|{stem}\.[0-9a-f]{{8}}\.[a-z]+{suffix}({data})?")
        return [path for path in self.target.parent.iterdir() if ours.fullmatch(path.name)]


def check_target(target: Path, *, force: bool | None) -> None:
    """Raise if a target is a folder, or exists although ``force`` is False.

    Raises:
        OutputPathError: The message has the path and the remedy.
    """
    if target.is_dir():
        raise OutputPathError(f"{target} is a folder: give the name of the file to write in it")
    if force is False and os.path.lexists(target):
        raise OutputPathError(
            f"{target} exists, and force=False was given: leave it out (on the command line, pass --force), "
            "or give another name"
        )


@contextmanager
def staging(target: Path, data: str | None = None) -> Iterator[Staging]:
    """Create a staging folder next to ``target``, and always delete it at the end.

    Args:
        target: The model file.
        data: Name of its file of weights; None for a unique name.

    Raises:
        ExportError: The folder of the target cannot be created or written to.
    """
    # The same folder is on the same file system, where a move is atomic.
    prefix = f".{target.name}."
    missing = [parent for parent in target.parents if not parent.exists()]
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
        # Delete folders that were created for a file that was not written.
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def write_errors(target: Path, size: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the file system into an ExportError that says if the old file still exists.

    Args:
        target: The file that is written.
        size: Its size in bytes, for the message.

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
    # Windows cannot open folders, and some network file systems cannot flush them. A move there has only
    # their own guarantees.
    try:
        flush(path)
    except OSError as error:
        _log.debug("cannot flush %s: %s", path, error)


# Total size of weights above which they go into separate files. A model file with weights inside is built in
# memory and takes twice their size. Weights in separate files are written one by one.
EXTERNAL_DATA_BYTES = 256 * 1024**2

# Size of one file of weights that every file system and download supports.
SHARD_BYTES = 4_000_000_000

_PROTO_BYTES = 2**31 - 1  # the limit of a protobuf message
# A multiple of the page size of every system, so that weights can be mapped into memory.
_PAGE = 65536


def write(
    model: ir.Model, stage: Staging, limit: int = EXTERNAL_DATA_BYTES, shard: int = SHARD_BYTES
) -> dict[str, int]:
    """Write the files of a model.

    Weights in separate files are written one after the other. So memory holds at most one copied weight, in
    addition to the model.

    Args:
        model: The graph with its weights.
        stage: The staging folder.
        limit: Total bytes of weights above which they go into separate files.
        shard: Bytes of one such file. A larger weight has a separate file.

    Returns:
        Sizes in bytes of all files by name, the model first.

    Raises:
        ExportError: The disk is full or cannot be written to, or ``limit`` puts more weights into the model
            file than it can hold.
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
# Smaller weights take little memory, and constants of them may be folded.
_DEFERRED_BYTES = 1024**2


@dataclass
class Scratch:
    """Storage that moves new tensors out of memory.

    Args:
        stage: The stage whose folder gets the files.
        allowance: Bytes that may stay in memory.
        deferred_bytes: Size from which a weight is computed when it is read, if that is possible.

    Attributes:
        deferred: Weights that are computed when they are read.
    """

    stage: Staging
    allowance: int = _ALLOWANCE_BYTES
    deferred_bytes: int = _DEFERRED_BYTES
    deferred: Deferred = field(default_factory=Deferred, init=False)

    def keep(self, tensor: Tensor, again: Callable[[], Tensor] | None = None, /) -> Tensor:
        """Return the tensor itself, or a tensor with the same values that takes no memory.

        A large weight that can be computed again is computed at each read. Any other weight that exceeds the
        rest of the allowance is copied into a mapped file.

        Args:
            tensor: A new weight.
            again: Computes the same values again; None if that is not possible.

        Raises:
            ExportError: The disk is full or cannot be written to.
        """
        if tensor.device.type != "cpu":
            return tensor
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if again is not None and plain and tensor.nbytes >= self.deferred_bytes:
            return self.deferred.add(tensor, again)
        if tensor.nbytes <= self.allowance:
            self.allowance -= tensor.nbytes
            return tensor
        with write_errors(self.stage.target, tensor.nbytes):
            return _mapped(tensor, self.stage.folder)


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        # Reserve disk blocks first, because writing to a map on a full disk would kill the process.
        _reserve(descriptor, tensor.nbytes)
        storage = torch.UntypedStorage.from_file(name, True, tensor.nbytes)
    finally:
        os.close(descriptor)
        # The mapping lives until the last tensor is gone. Windows cannot delete an open file, so the
        # file goes with the staging folder.
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
