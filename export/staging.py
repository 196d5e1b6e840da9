"""Memory for the weights that an export makes anew: merged ones, and those of another precision.

A model that fills the machine's memory leaves no room for a second one. So what goes beyond a small
allowance is kept in files in the staging folder, mapped into memory: the system writes them out when
memory runs short and reads them back when they are used.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.export.placement import Staging, write_errors

__all__ = ["ALLOWANCE_BYTES", "Scratch"]

ALLOWANCE_BYTES = 256 * 1024**2


class Scratch:
    """Takes tensors out of memory.

    Args:
        stage: Whose folder the files go to.
        allowance: Bytes that may stay in memory.
    """

    def __init__(self, stage: Staging, allowance: int = ALLOWANCE_BYTES) -> None:
        self._stage = stage
        self._left = allowance

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or once the allowance is used up its values in a mapped file.

        Raises:
            ExportError: The disk is full or cannot be written to.
        """
        if tensor.device.type != "cpu":
            return tensor
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            return tensor
        with write_errors(self._stage.target, tensor.nbytes):
            return _mapped(tensor, self._stage.folder)


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
