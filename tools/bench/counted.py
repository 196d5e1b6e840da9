"""ATen operations of a step: the same figure on every machine."""

from __future__ import annotations

import collections
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.passes.kept import saved_storages, tensors
from lora_fx.torch_private import pytree

__all__ = [
    "Memory",
    "alive_bytes",
    "count_operations",
    "measure_memory",
    "saved_by",
    "saved_bytes",
]


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
    """Runs a step and counts the storages that its operations make, as long as they are referenced.

    What a kernel allocates for itself is not seen.
    """
    with _PeakCounter() as counter:
        step()
    return Memory(counter.peak, counter.largest)


class _PeakCounter(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        key = torch_private.storage_key(storage)
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._known.discard, key)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = torch_private.storage_key(storage), storage.nbytes()
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


def alive_bytes(forward: Callable[[], Any]) -> int:
    """Runs a forward and counts the memory of what its operations have made and left.

    It is a second count of what :func:`saved_bytes` counts, by another way: not by what autograd says.

    Args:
        forward: Gives the tensor that the backward starts from, which counts.
    """
    with _Maker() as maker:
        kept = forward()
    gc.collect()
    # Storages that copy on write are several, and share one memory until one of them is written to.
    memory = {_address(storage): storage.nbytes() for storage in maker.alive()}
    del kept
    return sum(memory.values())


class _Maker(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the storages that operations make, and keeps none of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def alive(self) -> Iterator[torch.UntypedStorage]:
        """Those that are there."""
        for made in self._made:
            if (storage := made()) is not None:
                yield storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [
            torch_private.storage_key(one.untyped_storage())
            for one in pytree.tree_leaves((args, kwargs))
            if isinstance(one, Tensor)
        ]
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if (
                isinstance(made, Tensor)
                and torch_private.storage_key(made.untyped_storage()) not in given
            ):
                self._made.append(weakref.ref(made.untyped_storage()))
        return out


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Runs a forward and counts what autograd keeps when it is done, without the model's parameters.

    Args:
        model: Whose parameters and their scales do not count: they are there anyway, frozen or not.
        forward: Gives the tensor that the backward starts from.
    """
    return sum(saved_by(model, forward, lambda tensor: "").values())


def saved_by(
    model: nn.Module, forward: Callable[[], Any], kind: Callable[[Tensor], str]
) -> dict[str, int]:
    """The same by kind.

    Args:
        model: Whose parameters do not count.
        forward: Gives the tensor that the backward starts from.
        kind: Names what a tensor is; the first one that is kept of a storage says what the storage is.
    """
    # Storages that copy on write are several, and share one memory until one of them is written to.
    memory: dict[int, tuple[str, int]] = {}
    for name, storage in saved_storages(_belonging(model), forward, kind):
        memory.setdefault(_address(storage), (name, storage.nbytes()))
    found: dict[str, int] = collections.defaultdict(int)
    for name, size in memory.values():
        found[name] += size
    return dict(found)


def _address(storage: torch.UntypedStorage) -> int:
    """Where the memory of a storage is; ``data_ptr`` may make a copy, since its caller could write there."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch_private.data_address(whole)


def _belonging(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, and what a library stores with a quantized one."""
    for parameter in model.parameters():
        yield parameter
        yield from tensors(vars(parameter))
    for module in model.modules():
        yield from tensors(vars(module).get("state"))


def count_operations(step: Callable[[], Any]) -> int:
    """Runs a step, forward and backward, and counts what it calls below autograd.

    Views are left out: they compute nothing.
    """
    with _OperationCounter() as counter:
        step()
    return int(counter.count)


class _OperationCounter(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))
