"""Bytes that a step keeps for its backward: what saved-tensor hooks see, each storage once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["saved_bytes"]


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Runs a forward and counts what autograd keeps, without the model's parameters.

    Args:
        model: Whose parameters do not count: they are there anyway, frozen or not.
        forward: Gives something that keeps the graph alive.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(seen.values())
