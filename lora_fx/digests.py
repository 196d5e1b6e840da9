"""Digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["add_values"]


def add_values(digest: hashlib._Hash, values: Tensor) -> None:
    """Add the bytes of a dense tensor's elements to a digest, in the order of the elements.

    The bytes are copied. A NumPy array over the memory of a tensor would forbid that its storage is resized
    from then on, and FSDP1 frees gathered weights by resizing them.

    Args:
        digest: A digest of ``hashlib``.
        values: Tensor of any shape, dtype and device.

    Raises:
        NotImplementedError: The tensor has no values, as on the meta device.
    """
    copied = values.detach().to("cpu", copy=True).contiguous()
    digest.update(copied.flatten().view(torch.uint8).numpy())
