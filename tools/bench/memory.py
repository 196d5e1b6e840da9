"""Memory of a step, counted tensor by tensor: the same figure on every machine."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Memory", "measure_memory"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a step allocates.

    Attributes:
        peak: The most bytes that were held at once, beyond what was there before.
        largest: Bytes of the largest tensor that an operation made.
    """

    peak: int
    largest: int


def measure_memory(step: Callable[[], Any]) -> Memory:
    """Runs a step and counts the storages that its operations make, as long as somebody holds them.

    What a kernel allocates for itself is not seen.
    """
    with _Counter() as counter:
        step()
    return Memory(counter.peak, counter.largest)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.largest = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in pytree.tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._meet(given.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self._count(made.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        """It was there before. When it goes, a new one can take its address, and that one counts."""
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._known.discard, key)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)
        # PyTorch keeps the Python object of a storage for as long as anything holds the storage.
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
