"""Tensors of a model and of a file: gathered where they are sharded, and written back in place."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["for_file", "gathered", "write"]


def for_file(value: torch.Tensor) -> torch.Tensor:
    """The same numbers on the CPU, contiguous, with storage of their own."""
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which FSDP2 shards (a DTensor): then every rank has to call this."""
    found: Any = tensor.detach()
    whole: torch.Tensor = found.full_tensor() if _is_sharded(found) else found
    return whole


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole value into a tensor of a model, into this rank's part of it where it is sharded."""
    if _is_sharded(tensor):
        # The package loads with the first DTensor, not with lora_fx.
        from torch.distributed.tensor import distribute_tensor

        place: Any = tensor
        value = value.to(tensor.device, tensor.dtype)
        # Every rank has read the same file: nothing has to be sent.
        value = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
    with torch.no_grad():
        tensor.copy_(value)


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")
