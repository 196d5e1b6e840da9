"""Bytes that a step keeps for its backward, all memory once.

It is what saved-tensor hooks see, and what functions keep as attributes behind autograd's back, as those of
bitsandbytes do.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["saved_by", "saved_bytes"]


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
    own = {tensor.untyped_storage()._cdata for tensor in _belonging(model)}
    seen: dict[int, _Kept] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in own and key not in seen:
            # What is let go of before the forward ends (a result that is detached) is not kept, and
            # another storage can take its address.
            seen[key] = _Kept(kind(tensor), weakref.ref(storage))
            weakref.finalize(storage, seen.pop, key)
        # A node that keeps its own result as it is would keep itself, too, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    for tensor in _attributes(kept):
        pack(tensor)
    # Storages that copy on write are several, and have one memory until somebody writes.
    memory: dict[int, tuple[str, int]] = {}
    for one in tuple(seen.values()):
        if (storage := one.storage()) is not None:
            memory.setdefault(_address(storage), (one.kind, storage.nbytes()))
    found: dict[str, int] = collections.defaultdict(int)
    for name, size in memory.values():
        found[name] += size
    del kept
    return dict(found)


class _Kept(NamedTuple):
    kind: str
    storage: weakref.ref[torch.UntypedStorage]


def _address(storage: torch.UntypedStorage) -> int:
    """Where the memory of a storage is; ``data_ptr`` may make a copy, since its caller could write there."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    address: int = torch._C._data_address(whole)  # type: ignore[attr-defined]
    return address


def _belonging(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, and what a library keeps beside one that it has quantised."""
    for parameter in model.parameters():
        yield parameter
        yield from _tensors(vars(parameter))
    for module in model.modules():
        yield from _tensors(vars(module).get("state"))


def _attributes(result: Any) -> Iterator[Tensor]:
    """What the nodes of a graph hold that were written in Python."""
    waiting, seen = [getattr(result, "grad_fn", None)], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [above for above, _ in node.next_functions]
        yield from _tensors(getattr(node, "__dict__", None))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in what it holds, and in the fields of records."""
    inner: Sequence[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inner = [*value.values()]
    elif isinstance(value, list | tuple):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif type(value).__name__ == "QuantState":
        inner = [*vars(value).values()]
    for one in inner:
        yield from _tensors(one)
