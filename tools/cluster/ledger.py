"""Counts the bytes that tensors occupy while code runs, and those that collectives move."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Ledger", "nbytes"]

_GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_", "all_gather_into_tensor")
_SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor")
_REDUCES = ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_")
_FILLS = ("all_gather_copy_in", "split_with_sizes_copy")


class Ledger(TorchDispatchMode):
    """The live storages of a piece of code: it sees every operation below autograd, real or fake.

    Attributes:
        peak: The most bytes that were live at once.
        gathered: The most bytes of gathered weights that were live at once.
        sent: Bytes that this process sends, by collective, if each is a ring (NCCL's choice for large ones):
            (n - 1) / n of the whole for a gather or a scatter, twice that for a reduction.
        calls: How many collectives there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.gathered = 0
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, Any] = {}
        self._gathered: set[int] = set()
        self._live = 0

    @property
    def live(self) -> int:
        """Bytes that are live now."""
        self._look_again()
        return self._live

    @property
    def live_gathered(self) -> int:
        """Those of them that are gathered weights."""
        self._look_again()
        return self._held()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(one, torch.distributed.tensor.DTensor) for one in types):
            return NotImplemented  # it comes back with the local tensors
        name, space = func.overloadpacket.__name__, func.namespace
        if space in ("c10d", "_c10d_functional"):
            self._look_again()
            self._count(name, args)
        result = func(*args, **kwargs)
        written = [one for one in pytree.tree_leaves((result, args, kwargs)) if _is_tensor(one)]
        for tensor in written:
            self._see(tensor)
        if name in _GATHERS or (space == "fsdp" and name in _FILLS):
            made = [kwargs.get("out"), args[:1], result] if name in _GATHERS else [result, kwargs]
            self._gathered |= {_key(one) for one in pytree.tree_leaves(made) if _is_tensor(one)}
        self.peak = max(self.peak, self._live)
        if self._gathered:
            self.gathered = max(self.gathered, self._held())
        return result

    def _held(self) -> int:
        return sum(self._sizes.get(key, 0) for key in self._gathered)

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, torch.distributed.tensor.DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key not in self._refs:
            self._refs[key] = weakref.ref(storage, lambda _, key=key: self._drop(key))
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _drop(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)
        self._gathered.discard(key)

    def _look_again(self) -> None:
        """FSDP frees a gathered weight by resizing its storage, which is no operation."""
        for key, reference in list(self._refs.items()):
            storage = reference()
            if storage is not None:
                self._set(key, storage.nbytes())

    def _count(self, name: str, args: Any) -> None:
        tensors = [one for one in pytree.tree_leaves(args) if _is_tensor(one)]
        sizes = sorted(one.numel() * one.element_size() for one in tensors)
        if name in (*_GATHERS, *_SCATTERS) and sizes[0]:
            self.calls["gather" if name in _GATHERS else "scatter"] += 1
            self.sent["gather" if name in _GATHERS else "scatter"] += sizes[-1] - sizes[0]
        elif name in _REDUCES:
            members = _members(args)
            self.calls["reduce"] += 1
            self.sent["reduce"] += 2 * sum(sizes) * (members - 1) // members


def _members(args: Any) -> int:
    for one in pytree.tree_leaves(args):
        if isinstance(one, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return int(torch.distributed.ProcessGroup.unbox(one).size())
    return torch.distributed.get_world_size()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once; of a sharded one, what lies here."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        found[_key(local)] = local.untyped_storage().nbytes()
    return sum(found.values())
