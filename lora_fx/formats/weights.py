"""Weights that are stored in few bits, and the products with them.

A quantised weight is a parameter as its library makes it: ``Params4bit`` and ``Int8Params`` of bitsandbytes,
a tensor subclass of torchao. It always holds a matrix [out, in]. What its kernel computes is that library's
business (the operation is opaque); here is what every user of one asks: what it is (:func:`quantization_of`),
its values (:func:`dense`), and ``x Wᵀ + b`` (:func:`quantized_linear`), whose backward makes the values anew
and keeps none of them.

No library is imported here: a model that has such a weight has loaded its library.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from lora_fx.ir import Quantization

__all__ = [
    "DESCRIBED",
    "VALUES",
    "bitsandbytes",
    "dense",
    "held",
    "quantization_of",
    "quantized_linear",
    "row_scales",
]


# --- bitsandbytes ------------------------------------------------------------------------------------


def bitsandbytes() -> Any:
    """The library, which has been imported."""
    return sys.modules["bitsandbytes"]


def _describe_four_bits(weight: Any) -> Quantization | None:
    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    shape = (int(state.shape[0]), int(state.shape[1]))
    scheme, double = str(state.quant_type), bool(state.nested)
    return Quantization(scheme, 4, "bitsandbytes", shape, state.dtype, int(state.blocksize), double)


def _describe_eight_bits(weight: Any) -> Quantization | None:
    if weight.dtype != torch.int8 or weight.dim() != 2 or row_scales(weight) is None:
        return None
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return Quantization("int8", 8, "bitsandbytes", shape, torch.float32)


def _four_bit_values(weight: Any, dtype: torch.dtype) -> Tensor:
    # As the kernel has them for inputs of that type: in fp32 they are not rounded to the weight's own first.
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32 if dtype == torch.float64 else dtype
    found: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, state)
    return found


def _eight_bit_values(weight: Any, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values: Tensor = weight.data.to(wide) * (row_scales(weight).to(wide) / 127).unsqueeze(1)
    return values


def row_scales(weight: Any) -> Any:
    """The largest magnitude in each row of an 8-bit weight of bitsandbytes, [out]; None if there is none."""
    # The layer's own forward takes them away from the weight: a copy has them in one more place.
    return weight.SCB if weight.SCB is not None else getattr(weight, "row_scales", None)


# --- torchao -----------------------------------------------------------------------------------------


def _describe_int8(weight: Any) -> Quantization | None:
    # With quantised activations the product is no product with this matrix.
    if weight.dim() != 2 or weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return None
    return _torchao("int8", 8, weight, weight.block_size[-1])


def _describe_intx(weight: Any) -> Quantization | None:
    bits = {"torch.int4": 4, "torch.int8": 8}.get(str(weight.target_dtype))
    if bits is None or weight.dim() != 2 or weight.activation_quantization is not None:
        return None
    return _torchao(f"int{bits}", bits, weight, weight.block_size[-1])


def _describe_int4(weight: Any) -> Quantization | None:
    if weight.dim() != 2 or weight.act_pre_scale is not None:
        return None
    return _torchao("int4", 4, weight, weight.block_size[-1])


def _describe_nf4(weight: Any) -> Quantization | None:
    if weight.dim() != 2:
        return None
    return dataclasses.replace(_torchao("nf4", 4, weight, weight.block_size), double=True)


def _torchao(scheme: str, bits: int, weight: Any, block: int) -> Quantization:
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    size = None if block == shape[1] and scheme != "nf4" else int(block)
    return Quantization(scheme, bits, "torchao", shape, weight.dtype, size)


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    found: Tensor = weight.dequantize()
    return found


def _int8_values(weight: Any, dtype: torch.dtype) -> Tensor:
    # Its scales are fp32 whatever it stands for, and it knows nothing wider.
    found: Tensor = weight.dequantize(torch.float32 if dtype == torch.float64 else dtype)
    return found


def _nf4_values(weight: Any, dtype: torch.dtype) -> Tensor:
    found: Tensor = weight.get_original_weight()
    return found


DESCRIBED: Final[Mapping[str, Callable[[Any], Quantization | None]]] = {
    "Params4bit": _describe_four_bits,
    "Int8Params": _describe_eight_bits,
    "Int8Tensor": _describe_int8,
    "IntxUnpackedToInt8Tensor": _describe_intx,
    "Int4Tensor": _describe_int4,
    "NF4Tensor": _describe_nf4,
}
"""What a weight is, by its class; None where that is not known here."""

VALUES: Final[Mapping[str, Callable[[Any, torch.dtype], Tensor]]] = {
    "Params4bit": _four_bit_values,
    "Int8Params": _eight_bit_values,
    "Int8Tensor": _int8_values,
    "IntxUnpackedToInt8Tensor": _dequantized,
    "Int4Tensor": _dequantized,
    "NF4Tensor": _nf4_values,
}
"""Its values, [out, in], given the dtype that they are wanted in, by the same."""


def held(weight: Any) -> Any:
    """What a parameter holds: parameters of bitsandbytes are classes of their own, others wrap a tensor.

    An export has a module in the place of a parameter, whose ``held`` it is.
    """
    weight = getattr(weight, "held", weight)
    named = type(weight).__name__
    return (
        weight if named in DESCRIBED or not isinstance(weight, torch.nn.Parameter) else weight.data
    )


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
