"""Counts of a step's ATen operations and memory, which are the same on every machine."""

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
    """Memory that a step allocates.

    Attributes:
        peak: Most bytes allocated at once, beyond those allocated before.
        largest: Bytes of the largest tensor that an operation created.
    """

    peak: int
    largest: int


def measure_memory(step: Callable[[], Any]) -> Memory:
    """Run a step and count the storages that its operations create, as long as they are referenced.

    Memory that a kernel allocates internally is not counted.
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
        for argument in pytree.tree_leaves((args, kwargs)):
            if isinstance(argument, torch.Tensor):
                self._meet(argument.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for output in pytree.tree_leaves(out):
            if isinstance(output, torch.Tensor):
                self._count(output.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        """Note a storage that existed before the step, so that it is not counted.

        Once this storage is freed, a new storage may reuse its address, and is counted.
        """
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
    """Run a forward and count the bytes of the storages that are still allocated after it.

    This is a second count of the bytes that :func:`saved_bytes` counts, independent of autograd.

    Args:
        forward: Returns the tensor from which the backward starts. Its memory counts.
    """
    with _Maker() as maker:
        kept = forward()
    gc.collect()
    # Copy-on-write storages share one memory until one of them is written to.
    memory = {_address(storage): storage.nbytes() for storage in maker.alive()}
    del kept
    return sum(memory.values())


class _Maker(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that records weak references to the storages that operations create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def alive(self) -> Iterator[torch.UntypedStorage]:
        """Yield the recorded storages that are not freed yet."""
        for reference in self._made:
            if (storage := reference()) is not None:
                yield storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        input_keys = [
            torch_private.storage_key(argument.untyped_storage())
            for argument in pytree.tree_leaves((args, kwargs))
            if isinstance(argument, Tensor)
        ]
        out = func(*args, **(kwargs or {}))
        for output in pytree.tree_leaves(out):
            if (
                isinstance(output, Tensor)
                and torch_private.storage_key(output.untyped_storage()) not in input_keys
            ):
                self._made.append(weakref.ref(output.untyped_storage()))
        return out


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Run a forward and count the bytes that autograd saves, without the model's parameters.

    Args:
        model: Model whose parameters and their scales do not count, because they exist anyway.
        forward: Returns the tensor from which the backward starts.
    """
    return sum(saved_by(model, forward, lambda tensor: "").values())


def saved_by(
    model: nn.Module, forward: Callable[[], Any], kind: Callable[[Tensor], str]
) -> dict[str, int]:
    """Run a forward and count the bytes that autograd saves, for each kind of tensor.

    Args:
        model: Model whose parameters do not count.
        forward: Returns the tensor from which the backward starts.
        kind: Returns the kind of a tensor. The first saved tensor of a storage gives the kind of the storage.
    """
    # Copy-on-write storages share one memory until one of them is written to.
    memory: dict[int, tuple[str, int]] = {}
    for name, storage in saved_storages(_belonging(model), forward, kind):
        memory.setdefault(_address(storage), (name, storage.nbytes()))
    sizes: dict[str, int] = collections.defaultdict(int)
    for name, size in memory.values():
        sizes[name] += size
    return dict(sizes)


def _address(storage: torch.UntypedStorage) -> int:
    """Return the memory address of a storage.

    ``data_ptr`` may copy the memory, because its caller could write there.
    """
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch_private.data_address(whole)


def _belonging(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's parameters, and the tensors that belong to quantized ones, such as scales."""
    for parameter in model.parameters():
        yield parameter
        yield from tensors(vars(parameter))
    for module in model.modules():
        yield from tensors(vars(module).get("state"))


def count_operations(step: Callable[[], Any]) -> int:
    """Run a step, forward and backward, and count the operations that it calls below autograd.

    Views are left out, because they compute nothing.
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
