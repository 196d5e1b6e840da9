"""Bytes that a step keeps for its backward: what saved-tensor hooks see, each storage once."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["saved_by", "saved_bytes"]


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Runs a forward and counts what autograd keeps when it is done, without the model's parameters.

    Args:
        model: Whose parameters do not count: they are there anyway, frozen or not.
        forward: Gives something that keeps the graph alive.
    """
    return sum(saved_by(model, forward, lambda tensor: "").values())


def saved_by(
    model: nn.Module, forward: Callable[[], Any], kind: Callable[[Tensor], str]
) -> dict[str, int]:
    """The same by kind.

    Args:
        model: Whose parameters do not count.
        forward: Gives something that keeps the graph alive.
        kind: Names what a tensor is; the first one that is kept of a storage says what the storage is.
    """
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen: dict[int, tuple[str, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in own and key not in seen:
            seen[key] = (kind(tensor), storage.nbytes())
            # What is let go of before the forward ends (a result that is detached) is not kept, and
            # another storage can take its address.
            weakref.finalize(storage, seen.pop, key)
        # A node that keeps its own result as it is would keep itself, too, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    found: dict[str, int] = collections.defaultdict(int)
    for name, size in seen.values():
        found[name] += size
    del kept
    return dict(found)
