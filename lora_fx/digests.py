"""Digests of tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Digest", "add_values"]


class Digest(Protocol):
    """A digest of :mod:`hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_values(digest: Digest, values: Tensor) -> None:
    """Add the bytes of a dense tensor's elements to a digest, in the order of the elements.

    The bytes are copied. A NumPy array over the memory of a tensor would forbid that its storage is resized
    from then on, and FSDP1 frees gathered weights by resizing them.

    Args:
        digest: The digest.
        values: Tensor of any shape, dtype and device.

    Raises:
        NotImplementedError: If the tensor has no values, as on the meta device.
    """
    copied = values.detach().to("cpu", copy=True).contiguous()
    digest.update(copied.flatten().view(torch.uint8).numpy().tobytes())
