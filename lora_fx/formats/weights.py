"""Weights that are stored in few bits, and the products with them.

A quantised weight is a parameter as its library makes it: ``Params4bit`` and ``Int8Params`` of bitsandbytes,
a tensor subclass of torchao. It always holds a matrix [out, in]. What its kernel computes is that library's
business (the operation is opaque); here is what every user of one asks: what it is (:func:`quantization_of`),
its values (:func:`dense`), and ``x Wᵀ + b`` (:func:`quantized_linear`), whose backward makes the values anew
and keeps none of them.

No library is imported here: a model that has such a weight has loaded its library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from lora_fx.formats.quantized_weights import (
    DESCRIBED,
    VALUES,
    Quantization,
    bitsandbytes,
    held,
    row_scales,
)

__all__ = ["Quantization", "dense", "held", "quantization_of", "quantized_linear"]

_OF_FOUR_BITS = (torch.float16, torch.bfloat16, torch.float32)
"""What bitsandbytes' kernels compute in: in others they return other numbers, and no error."""


def quantization_of(weight: object) -> Quantization | None:
    """How a weight is stored; None if it is not quantised, or in a way that is not known here."""
    stored = held(weight)
    described = DESCRIBED.get(type(stored).__name__)
    return None if described is None else described(stored)


def dense(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a quantised weight, [out, in]; any other weight as it is, in its own shape.

    Args:
        weight: A parameter, or what it holds.
        dtype: Of the result; the weight's own by default.
    """
    found = quantization_of(weight)
    if found is None:
        return weight if dtype is None else weight.to(dtype)
    stored, wanted = held(weight), dtype or found.dtype
    # As its kernel has them, and rounded to the type of the result after that.
    values = VALUES[type(stored).__name__](stored, wanted)
    return values.to(wanted)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    training: bool = False,
    layout: str = "out_in",
) -> Tensor:
    """``x Wᵀ + b`` by the kernel of the library that the weight is of; differentiable in x and b.

    Under the transforms of ``torch.func`` it is a product with the values of the weight.

    Args:
        x: [..., in].
        weight: A quantised [out, in].
        bias: [out].
        compute_dtype: In which the product is computed, for 4 bits (``bnb_4bit_compute_dtype`` of
            bitsandbytes); x's by default. In fp64 it is a product with the values.
        threshold: Of LLM.int8() (arXiv:2208.07339): features of x with larger elements are multiplied in half
            precision.
        training: Whether the model trains, which LLM.int8() asks: on the CPU it then dequantises.
        layout: How the weight was stored before it was quantised: what a merge gives back.

    Returns:
        [..., out], in the dtype of x.
    """
    stood_for: Any = weight
    if not isinstance(stood_for, Tensor):  # a module of an export, which computes this by itself
        found: Tensor = handle_torch_function(quantized_linear, (weight,), x, weight, bias)
        return found
    given = x if compute_dtype is None else x.to(compute_dtype)
    bias = None if bias is None else bias.to(given.dtype)
    if torch._C._are_functorch_transforms_active():
        # The kernels know nothing of transforms.
        return F.linear(given, dense(weight, given.dtype), bias).to(x.dtype)
    name = type(held(weight)).__name__
    if name == "Params4bit":
        if given.dtype not in _OF_FOUR_BITS:
            return _opaque(given, weight, bias).to(x.dtype)
        return _four_bits(given, weight, bias).to(x.dtype)
    if name == "Int8Params":
        return _eight_bits(x, weight, bias, threshold, training)
    return _opaque(x, weight, bias)


def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


class _Product(torch.autograd.Function):
    """The product of a tensor subclass, or with values: opaque to autograd, which would keep the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.with_bias = weight, bias is not None
        by_values = _by_values(held(weight), x.dtype)
        out = F.linear(x, dense(weight, x.dtype) if by_values else weight, bias)
        # Some kernels return a view, into which a branch could not be added in place: it was made
        # without gradients.
        found: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        to_x = grad @ dense(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        wanted = ctx.with_bias and ctx.needs_input_grad[2]
        return to_x, None, grad.flatten(0, -2).sum(0) if wanted else None


def _by_values(stored: Any, dtype: torch.dtype) -> bool:
    """Whether there is no kernel for a weight and an input of a dtype."""
    name = type(stored).__name__
    # torchao's own function for nf4 computes this, too, and cannot be compiled as a whole. Params4bit comes
    # here with a dtype that its kernel lacks.
    if name in ("NF4Tensor", "Params4bit"):
        return True
    # ``model.half()`` leaves its scales as they are, and its product wants one dtype.
    return name == "IntxUnpackedToInt8Tensor" and stored.dtype != dtype


def _four_bits(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    found: Tensor = bitsandbytes().matmul_4bit(x, weight, weight.quant_state, bias=bias)
    return found


def _eight_bits(
    x: Tensor, weight: Any, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    state = bitsandbytes().MatmulLtState()
    state.CB, state.SCB = weight.data, row_scales(weight)
    state.threshold, state.use_pool = threshold, threshold > 0
    state.has_fp16_weights, state.is_training = False, training
    found: Tensor = bitsandbytes().matmul(x, weight, bias=bias, state=state)
    return found
