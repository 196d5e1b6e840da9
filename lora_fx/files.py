"""Atomic replacement of files, and weights of a model in safetensors, which are read one at a time."""

from __future__ import annotations

import contextlib
import filecmp
import json
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import safetensors

from lora_fx.errors import CheckpointError, ConfigError, OutputPathError, some

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "StoredHead",
    "WeightFiles",
    "bytes_in",
    "current",
    "flush",
    "output_file",
    "replacing",
    "replacing_files",
]


_POWERS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}


def bytes_in(text: str, option: str) -> int:
    """Return the bytes of a size: ``24GB`` (24 · 10^9 bytes), ``16GiB`` (16 · 2^30 bytes) or ``500B``.

    Args:
        text: The size.
        option: Name of the option, for the error.

    Raises:
        ConfigError: If the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r} is no size of a memory: write 24GB or 16GiB")
    base = 1024 if match[3] else 1000
    power = _POWERS[match[2].upper()] if match[2] else 0
    return int(float(match[1]) * base**power)


def output_file(path: object, suffixes: Sequence[str]) -> Path:
    """Return the path of a file to write, after checking it.

    Args:
        path: The path from the caller.
        suffixes: The allowed suffixes of the file, in lower case.

    Raises:
        OutputPathError: If it is not a path, is or names a folder, or has another suffix. The message
            suggests a valid path.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text:
        description = repr(text) if isinstance(text, str) else f"a {type(path).__name__}"
        raise OutputPathError(f"path is {description}: give the name of the file to write")
    target = Path(text)
    # A Path drops the separator at the end, which marks a folder.
    ends = tuple(separator for separator in (os.sep, os.altsep) if separator)
    if text.endswith(ends) or target.name in ("", "..") or target.is_dir():
        example = target / f"model{suffixes[0]}"
        raise OutputPathError(
            f"{text} is a folder: give the name of the file to write in it, as {example}"
        )
    if target.suffix.lower() not in suffixes:
        known = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        has = f"the suffix {target.suffix}" if target.suffix else "no suffix"
        raise OutputPathError(
            f"{text} has {has}, and a file of this kind has {known}: write to "
            f"{target.with_suffix(suffixes[0])}, for example"
        )
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, whose file replaces ``path`` on success.

    Args:
        path: The final path. An existing file stays unchanged until the context ends, and also after an
            error.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file from the caches of the system to the disk. A full disk may cause an error only here.

    Raises:
        OSError: If the file cannot be opened, or the disk is full.
    """
    # Windows flushes a file only through a handle that may write. Elsewhere the file may be read-only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_SAVING: Final = ".saving-"  # prefix of a folder that a process writes
_PLACING: Final = ".placing-"  # prefix of a complete folder, whose files are being moved
_LEFT_BEHIND = 3600  # seconds after which a process of another machine counts as dead
_SETTLED = 60  # seconds after which a stopped process of this machine counts as dead


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of ``folder`` on success.

    After an error the files are unchanged. If the process is killed, :func:`current` finds either the old
    files or all new ones. The next process that writes moves complete files to their paths and deletes all
    others.

    Args:
        folder: An existing folder. The files may be in subfolders.
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
    """Return the path of the newest complete version of a file.

    If a process was killed while it moved a new version to ``path``, that version is still in another folder.
    """
    newest = path
    with contextlib.suppress(OSError):  # another process is moving it
        for placing in path.parent.glob(f"{_PLACING}*"):
            waiting = placing / path.name
            if waiting.is_file() and not (newest.exists() and _written(newest) > _written(waiting)):
                newest = waiting
    return newest


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _clear(folder: Path) -> None:
    """Clean up after killed processes: move complete files to their paths, and delete all others."""
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
    """Return True if the name and the age of a temporary folder show that its process is dead."""
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
    """Move all files of ``staged`` into ``folder``, or none. ``kept`` gets the files that they replace."""
    kept.mkdir()
    waiting = folder / staged.parent.name.replace(_SAVING, _PLACING)
    names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    if not any(folder.glob(f"{_PLACING}*")):
        # A single changed file is a single move, so no reader sees half of it.
        names = [name for name in names if not _same(staged / name, folder / name)]
    for name in names:
        if (folder / name).exists():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            _back_up(folder / name, kept / name)
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


def _back_up(path: Path, copy: Path) -> None:
    """Keep a file as a hard link at ``copy``, or as a copy if the file system has no links."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


_INDEX = ".safetensors.index.json"


class StoredHead(NamedTuple):
    """The description of a tensor in the header of a file.

    Attributes:
        shape: Shape of the tensor.
        dtype: The name of the dtype in safetensors, as ``BF16``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def bits(self) -> int:
        """The size of an element in bits, from the name of the dtype, as ``F8_E4M3``; 8 for ``BOOL``."""
        digits = re.search(r"\d+", self.dtype)
        return 8 if digits is None else int(digits[0])

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.bits // 8


class WeightFiles:
    """The tensors in the files of a folder, without loading them.

    Each read opens the file and closes it again, because all pages that were read from an open file count as
    memory of this process.

    Attributes:
        path: The folder, or the file.
        index: The file with the index of the shards; None if there is a single file of weights.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers of the files.

        Args:
            path: A folder with ``model.safetensors``, or with shards and their index; or one such file.

        Raises:
            CheckpointError: If there are no files, or a file is damaged.
        """
        self.path = path
        self.index, listed = _listed(path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file, names in listed.items():
            try:
                with safetensors.safe_open(file, "pt") as opened:
                    stored = opened.keys()
                    for name in names or stored:
                        head = opened.get_slice(name)
                        self._shapes[name] = tuple(head.get_shape())
                        self._dtypes[name] = str(head.get_dtype())
                        self._files[name] = file
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{file} is missing, truncated or damaged ({error}); copy it again"
                ) from error

    def reader(self, model: nn.Module) -> Callable[[str], torch.Tensor]:
        """Return a function that reads a parameter or buffer of a model by its name, in the model's dtype.

        Args:
            model: The model of these weights. A tied weight may have any of its names in the files.

        Returns:
            A function of the name. The tensor is on the CPU and may be memory-mapped, so copy it to keep it.

        Raises:
            CheckpointError: If a tensor is missing, unexpected or has another shape, or the file has integers
                for a floating-point weight.
        """
        wanted = dict(_persistent(model))
        names: dict[int, list[str]] = {}
        for name, tensor in wanted.items():
            names.setdefault(id(tensor), []).append(name)
        in_files = {*self.names}
        stored = {
            name: next((alias for alias in names[id(tensor)] if alias in in_files), None)
            for name, tensor in wanted.items()
        }
        missing = [name for name, key in stored.items() if key is None]
        known = wanted.keys() | {name for name, _ in model.named_buffers()}
        unexpected = sorted(in_files - known)
        other = [
            f"{name} {objection}"
            for name, key in stored.items()
            if key is not None and (objection := self._objection(key, wanted[name])) is not None
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
            values = self._read(key)
            if values.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{name} is {tuple(values.shape)} in {self.path} and {tuple(wanted[name].shape)} in the "
                    "model: make the model with the configuration that the weights were saved with"
                )
            return values.to(wanted[name].dtype)

        return read

    @property
    def names(self) -> Iterable[str]:
        """Return the names of the tensors."""
        return self._files.keys()

    def tensor(self, *names: str) -> torch.Tensor | None:
        """Return the stored tensor of the first of these names that exists, or None.

        Raises:
            CheckpointError: If the tensor cannot be read.
        """
        return next((self._read(name) for name in names if name in self.names), None)

    def _objection(self, key: str, wanted: torch.Tensor) -> str | None:
        """Return why a stored tensor does not fit a tensor of the model, or None if it does."""
        if self._shapes[key] != tuple(wanted.shape):
            return f"is {self._shapes[key]} there and {tuple(wanted.shape)} in the model"
        # The names in safetensors for integers of all widths and for booleans.
        if wanted.is_floating_point() and self._dtypes[key].startswith(("I", "U", "BOOL")):
            return (
                f"is of whole numbers there, {self._dtypes[key]}, and {wanted.dtype} in the model"
            )
        return None

    def _read(self, key: str) -> torch.Tensor:
        return self.stored(key)

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the files, on the CPU; it is memory-mapped.

        Raises:
            CheckpointError: If the tensor cannot be read.
        """
        try:
            with safetensors.safe_open(self._files[name], "pt") as opened:
                values: torch.Tensor = opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{name} cannot be read from {self._files[name]} ({error})"
            ) from error
        return values

    @property
    def heads(self) -> dict[Path, dict[str, StoredHead]]:
        """The shapes and dtypes in each file, by the names of the tensors there."""
        result: dict[Path, dict[str, StoredHead]] = {}
        for name, file in self._files.items():
            result.setdefault(file, {})[name] = StoredHead(self._shapes[name], self._dtypes[name])
        return result

    def stored_name(self, name: str) -> str | None:
        """Return the name of a parameter in the files; None if the files do not have it as one tensor."""
        return name if name in self._files else None


def _persistent(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a checkpoint of a model holds, with their names.

    These are the parameters and the persistent buffers. A tied parameter is yielded under each of its names.
    """
    from lora_fx import torch_private  # loads torch

    yield from model.named_parameters(remove_duplicate=False)
    for fqn, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in torch_private.transient_buffers(module):
                yield f"{fqn}.{key}" if fqn else key, buffer


def _listed(path: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """Find the safetensors at a path: return the index of shards, and the names of tensors in each file.

    Without an index, the first value is None, and the names of the file are left empty.
    """
    if path.is_file():
        return None, {path: []}
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a folder with safetensors, or a file")
    indices = sorted(path.glob(f"*{_INDEX}"))
    files = sorted(path.glob("*.safetensors"))
    preferred = [file for file in (*indices, *files) if file.name.startswith("model.safetensors")]
    if preferred and preferred[0] in files:
        return None, {preferred[0]: []}
    if not indices and len(files) == 1:
        return None, {files[0]: []}
    if not indices:
        summary = f"{len(files)} files and no index" if files else "none"
        gguf_files = sorted(str(file) for file in path.glob("*.gguf"))
        remedy = f". For GGUF, give the file: {some(gguf_files, 3)}" if gguf_files else ""
        raise CheckpointError(
            f"{path} has to hold model.safetensors, or shards with an index; found {summary}{remedy}"
        )
    index = preferred[0] if preferred else indices[0]
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        result: dict[Path, list[str]] = {}
        for name, file in where.items():
            # Drop folders from the name: the file has to be next to the index.
            result.setdefault(path / Path(file).name, []).append(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards ({error!r}); copy it again"
        ) from error
    return index, result
