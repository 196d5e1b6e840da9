"""Runs a save in a process that is killed while it writes, at each place in turn."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

__all__ = ["killed", "torn"]

_FILES = ("open", "os.", "shutil.", "tempfile.")
_READING = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}


def killed(save: Callable[[], None], folder: Path, every: int = 1, first: int = 0) -> Iterator[int]:
    """Kills a process before its first step in a folder, another one before its second, and so on.

    Steps are what Python's audit hooks see: files that are opened, moved, linked and deleted.

    Args:
        save: What the process does.
        folder: Where steps count.
        every: How many steps there are between two kills.
        first: The step before which the first process is killed.

    Yields:
        How many steps the process has done. The last one has come to its end.
    """
    step = first
    while True:
        ended = _ends(save, folder, step)
        yield step
        if ended:
            return
        step += every


def _ends(save: Callable[[], None], folder: Path, last: int) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            _kill_at(folder, last)
            save()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def _kill_at(folder: Path, last: int) -> None:
    steps = 0

    def audit(event: str, given: tuple[Any, ...]) -> None:
        nonlocal steps
        if not event.startswith(_FILES) or event in _READING:
            return
        # A name without a folder is one in a folder that is being deleted.
        paths = [os.fspath(one) for one in given if isinstance(one, str | Path)]
        if not any(one.startswith(str(folder)) or os.sep not in one for one in paths[:2]):
            return
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    sys.addaudithook(audit)


def torn(save: Callable[[], None], number: int) -> None:
    """Kills a process in the middle of a file of tensors.

    Args:
        save: What the process does.
        number: Which of the files that it writes.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            _kill_in_file(number)
            save()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def _kill_in_file(number: int) -> None:
    original = safetensors.torch.save_file
    calls = 0

    def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        nonlocal calls
        original(tensors, filename, metadata)
        if calls == number:
            os.truncate(filename, Path(filename).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1

    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, name, save_file)
