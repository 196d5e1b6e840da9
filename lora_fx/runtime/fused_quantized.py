"""A product with a quantized weight and its LoRA branch as one function (QLoRA, arXiv:2305.14314).

``y = q(x) + s · (drop(x) Aᵀ) Bᵀ``, where q is the kernel of the library that the weight is of. The branch
is that of :mod:`lora_fx.runtime.fused_lora`: it is added in place into what the kernel gives, and x, the
product with A and, under dropout, one bit for each element of x are kept for the backward pass. The
weight's values are made anew there, and nothing of their size is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

from lora_fx.formats import dense, quantized_linear
from lora_fx.runtime.fused_lora import Rows, applied, autocast_dtype

__all__ = ["quantized_lora_linear"]


def quantized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
    rows: Rows | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    base_training: bool = False,
) -> Tensor:
    """:func:`lora_fx.formats.weights.quantized_linear` with a LoRA branch.

    The product is that of the operation alone to the last bit, and so is its dtype, also under autocast;
    the branch is computed in autocast's dtype, or in that of ``x``. Otherwise it behaves as
    :func:`lora_fx.runtime.fused_lora.lora_linear` does, but that a compiler sees plain operations and
    decides by itself what to keep. The weight is frozen.

    Args:
        x: [..., in].
        weight: A quantized [out, in].
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The factor s of the branch.
        dropout: Probability with which an element of the branch's input is zero; rounded as
            :func:`lora_fx.runtime.masks.kept` says.
        training: Whether there is dropout now.
        rows: Which of the outputs (start, stop) the branch is added to; None for all.
        compute_dtype: Of the product, as the next two; see :func:`lora_fx.formats.weights.quantized_linear`.
        threshold: Of LLM.int8().
        base_training: Whether the model trains, which LLM.int8() asks.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass, where A is frozen and both x and B want a gradient.
    """
    under = autocast_dtype(x.device.type)
    dtype = x.dtype if under is None or x.dtype == torch.float64 else under
    kernel = _Product(weight, compute_dtype, threshold, base_training, under)
    dropout = dropout if training else 0.0
    plain = torch.compiler.is_compiling()
    options = ((scale, rows, kernel),)
    return applied(x, dropout, options, (None, bias, a, b), dtype, plain)[0]


@dataclasses.dataclass(frozen=True, slots=True)
class _Product:
    """The base, a :class:`lora_fx.runtime.fused_lora.Kernel`.

    It holds the weight itself: ``save_for_backward`` would hand it to hooks that lose its scales. The
    parameter is there anyway.
    """

    weight: Tensor
    compute_dtype: torch.dtype | None
    threshold: float
    training: bool
    autocast: torch.dtype | None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with self._autocast(x.device.type):
            out = quantized_linear(
                x, self.weight, bias, self.compute_dtype, self.threshold, self.training
            )
        return out.contiguous()

    def to_input(self, grad: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.autocast or grad.dtype
        return grad.to(dtype) @ dense(self.weight, dtype)

    def _autocast(self, kind: str) -> contextlib.AbstractContextManager[object]:
        """As it was where the operation was called: around it, it is off."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(kind, self.autocast)
