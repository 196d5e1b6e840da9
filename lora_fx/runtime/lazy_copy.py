"""A copy of a tensor that takes no memory until somebody writes.

What an operation gives belongs to its caller, who may write into it: in place, through ``.data``, under
``no_grad``, from NumPy, from a kernel of their own. Version counters see only some of that. So a backward
that reads an output needs one that nobody else can reach, and a plain copy would take its memory twice, since
the next operation mostly keeps the same output for its own backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lazy_copy"]

_DEVICES = ("cpu", "cuda")


def lazy_copy(tensor: Tensor) -> Tensor:
    """The same values, which nobody who has ``tensor`` or a view of it can change.

    It is PyTorch's copy-on-write: both share memory, and the first access that may write into either gives
    that one a memory of its own, whatever it comes through. Kernels that ask for their operand as if they
    would write (oneDNN's batched product of bf16) cause a copy that was not needed, and nothing else.

    Args:
        tensor: Any. On other devices than a CPU or CUDA, as a subclass, or in memory that is not of PyTorch's
            own allocator, it is copied at once.

    Returns:
        Detached, in the same shape.
    """
    given = tensor.detach()
    if type(given) is not Tensor or given.device.type not in _DEVICES:
        return given.clone()
    try:
        return torch._lazy_clone(given)
    except RuntimeError:  # its storage is not one that can be shared so
        return given.clone()
