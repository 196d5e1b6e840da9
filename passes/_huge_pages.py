"""New memory for large tensors, in large pages where the system has them.

The kernel clears a page when it is touched first, and with pages of 4 KiB that takes longer than what a merge
computes for the weight in it. Linux gives pages of 2 MiB to who asks for them (``madvise`` is what
``/sys/kernel/mm/transparent_hugepage/enabled`` says on most systems); asking is a hint, which may be ignored.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

__all__ = ["new_memory"]

# Below this there are hardly any large pages in a tensor.
_LEAST = 1 << 22


def new_memory(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """``torch.empty``, for a tensor that is written as a whole.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Where; only on a CPU something is asked for.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    advise = _madvise() if tensor.device.type == "cpu" and size >= _LEAST else None
    if advise is not None:
        # Whole pages of the tensor's own: those at its ends may hold something else, too.
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's; None where there is nothing to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    call: Callable[[int, int, int], int] = found
    return call
