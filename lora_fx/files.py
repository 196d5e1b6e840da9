"""Files that are written whole or not at all, and the weights of a model in safetensors, read one by one."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import safetensors

from lora_fx.errors import CheckpointError, LoraFxError, OutputPathError, some

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["WeightFiles", "current", "flush", "output_file", "replacing", "replacing_files"]


def output_file(
    path: object, suffixes: Sequence[str], error: type[LoraFxError] = OutputPathError
) -> Path:
    """The path of a file that is to be written, before anything is.

    Args:
        path: What the caller gave.
        suffixes: Those that the file may have, in lower case.
        error: What is raised.

    Raises:
        OutputPathError: It is no path; it is or names a folder; or it has another suffix. With what to
            give instead.
    """
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given:
        found = repr(given) if isinstance(given, str) else f"a {type(path).__name__}"
        raise error(f"path is {found}: give the name of the file to write")
    target = Path(given)
    # A Path does not keep the separator at the end, which says that a folder is meant.
    ends = tuple(one for one in (os.sep, os.altsep) if one)
    if given.endswith(ends) or target.name in ("", "..") or target.is_dir():
        example = target / f"model{suffixes[0]}"
        raise error(f"{given} is a folder: give the name of the file to write in it, as {example}")
    if target.suffix.lower() not in suffixes:
        known = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        has = f"the suffix {target.suffix}" if target.suffix else "no suffix"
        raise error(
            f"{given} has {has}, and a file of this kind has {known}: write to "
            f"{target.with_suffix(suffixes[0])}, for example"
        )
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside a path to write, which takes its place if all goes well.

    Args:
        path: What is there stays as it is until then, and for good where something fails.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Write a file from the caches of the system to the disk. A full disk may show itself only here.

    Raises:
        OSError: The file cannot be opened, or the disk is full.
    """
    # Windows flushes a file only through a handle that may write. Elsewhere the file may be read-only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_SAVING: Final = ".saving-"  # what a process writes
_PLACING: Final = ".placing-"  # what is complete, and on its way to where it belongs
_LEFT_BEHIND = 3600  # seconds after which a process of another machine is taken for dead
_SETTLED = 60  # seconds after which one of this machine that does not run any more is


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Gives a folder to write files into, which take the places of those of their names if all goes well.

    After an error the files are as they were. A process may also be killed: :func:`current` then finds the
    files as they were, or all new ones. The next process that writes moves complete files to their places,
    and deletes all others.

    Args:
        folder: It is there. The files may be in folders below.
    """
    _clear(folder)
    with tempfile.TemporaryDirectory(
        prefix=f"{_SAVING}{_machine()}-{os.getpid()}-", dir=folder
    ) as name:
        staged = Path(name, "new")
        staged.mkdir()
        yield staged
        _place(staged, folder, Path(name, "old"))


def current(path: Path) -> Path:
    """Where the file of a name is: its path, unless a process was killed while it moved a new one there."""
    found = path
    with contextlib.suppress(OSError):  # another process is moving it
        for placing in path.parent.glob(f"{_PLACING}*"):
            waiting = placing / path.name
            if waiting.is_file() and not (found.exists() and _written(found) > _written(waiting)):
                found = waiting
    return found


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _clear(folder: Path) -> None:
    """End what killed processes have begun: complete files go to their places, others are deleted."""
    for path in (*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_PLACING}*")):
        with contextlib.suppress(OSError):  # another process does the same
            if not _is_left_behind(path):
                continue
            for file in sorted(path.rglob("*")) if path.name.startswith(_PLACING) else ():
                target = folder / file.relative_to(path)
                if file.is_file() and not (target.exists() and _written(target) > _written(file)):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
            shutil.rmtree(path)


def _is_left_behind(path: Path) -> bool:
    """Return True if the name and the age of such a folder say that its process is dead."""
    age = time.time() - path.stat().st_mtime
    machine, _, process = path.name.rpartition("-")[0].partition("-")[2].rpartition("-")
    if os.name == "nt" or machine != _machine() or not process.isdecimal():
        return age > _LEFT_BEHIND
    return age > _SETTLED and not _runs(int(process))


def _machine() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _place(staged: Path, folder: Path, kept: Path) -> None:
    """Moves every file of ``staged`` into ``folder``; all of them, or none."""
    kept.mkdir()
    waiting = folder / staged.parent.name.replace(_SAVING, _PLACING)
    names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    if not any(folder.glob(f"{_PLACING}*")):
        # One file that changes is one move, which no reader sees in half.
        names = [name for name in names if not _same(staged / name, folder / name)]
    for name in names:
        if (folder / name).exists():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            _keep(folder / name, kept / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    staged.replace(waiting)
    placed: list[Path] = []
    try:
        for name in names:
            (waiting / name).replace(folder / name)
            placed.append(name)
        shutil.rmtree(waiting)
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)
        for name in placed:
            if (kept / name).exists():
                (kept / name).replace(folder / name)
            else:
                (folder / name).unlink()
        raise


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, where the file system has such, or a copy."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


_INDEX = ".safetensors.index.json"


class WeightFiles:
    """What is in the files of a folder; nothing of it is in memory.

    A file is opened for each tensor and closed with it: as long as it is open, all pages that were ever read
    count as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        """Reads the heads of the files.

        Args:
            path: A folder with ``model.safetensors``, or with shards and their index; or one such file.

        Raises:
            CheckpointError: If there are none, or one is damaged.
        """
        self.path = path
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file, names in _listed(path).items():
            try:
                with safetensors.safe_open(file, "pt") as opened:
                    found = opened.keys()
                    for name in names or found:
                        head = opened.get_slice(name)
                        self._shapes[name] = tuple(head.get_shape())
                        self._dtypes[name] = str(head.get_dtype())
                        self._files[name] = file
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{file} is missing, truncated or damaged ({error}); copy it again"
                ) from error

    def reader(self, model: nn.Module) -> Callable[[str], torch.Tensor]:
        """Gives what reads a parameter or buffer of a model by its name, in the dtype that it has there.

        Args:
            model: Whose weights they are; a tied one may have any of its names in the files.

        Returns:
            A function of the name. The tensor is on the CPU and may lie in the mapped file: copy what is
            to stay.

        Raises:
            CheckpointError: If a tensor is missing, has another shape, or belongs to nothing, or a weight
                is of whole numbers.
        """
        wanted = dict(_persistent(model))
        names: dict[int, list[str]] = {}
        for name, tensor in wanted.items():
            names.setdefault(id(tensor), []).append(name)
        stored = {
            name: next((one for one in names[id(tensor)] if one in self._shapes), None)
            for name, tensor in wanted.items()
        }
        missing = [name for name, found in stored.items() if found is None]
        known = wanted.keys() | {name for name, _ in model.named_buffers()}
        unexpected = sorted(self._shapes.keys() - known)
        other = [
            f"{name} is {self._shapes[found]} there and {tuple(wanted[name].shape)} in the model"
            for name, found in stored.items()
            if found is not None and self._shapes[found] != tuple(wanted[name].shape)
        ]
        other += [
            f"{name} is of whole numbers there, {self._dtypes[found]}, and {wanted[name].dtype} in the model"
            for name, found in stored.items()
            if found is not None and wanted[name].is_floating_point()
            # Their names for integers of all widths and for truth values.
            if self._dtypes[found].startswith(("I", "U", "BOOL"))
        ]
        if missing or unexpected or other:
            words = [
                *([f"without {some(missing, 3)}"] if missing else []),
                *(
                    [f"with {some(unexpected, 3)}, which the model does not have"]
                    if unexpected
                    else []
                ),
                *other[:3],
            ]
            raise CheckpointError(
                f"{self.path} holds another model than this {type(model).__name__}: {'; '.join(words)}. "
                "Make the model with the configuration that the weights were saved with. Where its own "
                "loader gives weights other names, or joins them, load it by that, and leave weights= out"
            )

        def read(name: str) -> torch.Tensor:
            key = stored[name]
            assert key is not None
            return self._read(key).to(wanted[name].dtype)

        return read

    def tensor(self, *names: str) -> torch.Tensor | None:
        """One tensor as it is stored, by the first of these names that there is; None if there is none.

        Raises:
            CheckpointError: If it cannot be read.
        """
        return next((self._read(name) for name in names if name in self._files), None)

    def _read(self, key: str) -> torch.Tensor:
        try:
            with safetensors.safe_open(self._files[key], "pt") as opened:
                values: torch.Tensor = opened.get_tensor(key)
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{key} cannot be read from {self._files[key]} ({error})"
            ) from error
        return values


def _persistent(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by each of their names, and the buffers that a state dict has."""
    from lora_fx import torch_private  # loads torch

    yield from model.named_parameters(remove_duplicate=False)
    for fqn, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in torch_private.transient_buffers(module):
                yield f"{fqn}.{key}" if fqn else key, buffer


def _listed(path: Path) -> dict[Path, list[str]]:
    """The files, each with the names that an index says are in it."""
    if path.is_file():
        return {path: []}
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a folder with safetensors, or a file")
    indices = sorted(path.glob(f"*{_INDEX}"))
    files = sorted(path.glob("*.safetensors"))
    preferred = [one for one in (*indices, *files) if one.name.startswith("model.safetensors")]
    if preferred and preferred[0] in files:
        return {preferred[0]: []}
    if not indices and len(files) == 1:
        return {files[0]: []}
    if not indices:
        found = f"{len(files)} files and no index" if files else "none"
        raise CheckpointError(
            f"{path} has to hold model.safetensors, or shards with an index; found {found}"
        )
    index = preferred[0] if preferred else indices[0]
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        result: dict[Path, list[str]] = {}
        for name, file in where.items():
            # A name of a file beside the index, not a way to somewhere else.
            result.setdefault(path / Path(file).name, []).append(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({error!r}); copy it again"
        ) from error
    return result
