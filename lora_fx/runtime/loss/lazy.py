"""Helpers for tensors that are computed later: detection of reads of metadata, and an autograd history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import LoraFxError

__all__ = ["LazyHistory", "name_of", "reads_metadata"]

_FACTS = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "names"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_nested", "is_quantized", "is_sparse"),
    *("itemsize", "nbytes", "output_nr", "retains_grad", "grad", "is_sparse_csr", "is_mkldnn"),
}
_ASKING = {
    *("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point"),
    *("is_complex", "get_device", "len", "is_inference", "sym_size"),
}


class LazyHistory(torch.autograd.Function):
    """Autograd history of a lazy tensor. The backward runs only if code used the tensor as a computed one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor], error: LoraFxError) -> Tensor:
        """Return the lazy tensor that ``make`` creates. It requires a gradient if ``anchor`` does."""
        ctx.error = error
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        """Raise, because the gradient of the lazy tensor would be lost.

        Raises:
            LoraFxError: The ``error`` that was passed to :meth:`forward`.
        """
        raise ctx.error


def reads_metadata(func: Any) -> bool:
    """Return True if a function needs no values of a lazy tensor, only metadata such as its shape."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _FACTS
    return name_of(func) in _ASKING


def name_of(func: Any) -> str:
    """Return the bare name of a function, which is the same for a method and an operator of ATen."""
    if isinstance(func, torch_private.OpOverload):
        return str(torch_private.schema_of(func).name.partition("::")[2])
    name = str(getattr(func, "__name__", ""))
    # One trailing underscore stays: it marks an in-place operation.
    return name.strip("_") if name.startswith("__") else name
