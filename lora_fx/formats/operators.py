"""Operators of ONNX that read weights of few bits, whichever library they are of, and how codes lie in them.

``MatMulNBits`` is ONNX Runtime's own. A dequantized weight is read by a Gemm, not by a MatMul: ONNX Runtime
fuses ``DequantizeLinear → MatMul`` into a product that rounds its input to 8 bits (level 4 of
``session.qdq_matmulnbits_accuracy_level``, the default), which is off by 6e-3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.ir import OnnxBuilder, OnnxOperator, OnnxProduct, OnnxWeight

__all__ = [
    "CONTRIB",
    "DEQUANTIZE_LINEAR",
    "MATMUL_N_BITS",
    "STANDARD_OPERATORS",
    "packed_sizes",
    "whole_numbers",
]

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_OPERATOR_BLOCKS = (128, 64, 32, 16)
"""Those that every provider has a kernel for."""


def packed_sizes(product: OnnxProduct) -> dict[str, int]:
    """The attributes that ONNX Runtime's products have in common."""
    return {"N": product.rows, "K": product.columns, "block_size": product.block}


def _n_bits(build: OnnxBuilder, product: OnnxProduct) -> Any:
    # Level 1: the product is computed in fp32, its input is not rounded to 8 bits.
    attributes = {**packed_sizes(product), "bits": 4, "accuracy_level": 1}
    inputs = [product.x, *product.arrays]
    return build.product("MatMulNBits", inputs, attributes, domain=CONTRIB)


def _dequantize(build: OnnxBuilder, product: OnnxProduct) -> Any:
    x, rows, columns = product.x, product.rows, product.columns
    weight = build.op("DequantizeLinear", product.arrays, {"axis": 0})
    if product.block != columns:
        weight = build.op("Reshape", [weight, build.ints([rows, columns])])
    if not build.same_dtype(x, product.arrays[1]):
        weight = build.op("CastLike", [weight, x])
    if build.rank(x) == 2:
        return build.product("Gemm", [x, weight], {"transB": 1})
    flat = build.op("Reshape", [x, build.ints([-1, columns])], like=x)
    made = build.product("Gemm", [flat, weight], {"transB": 1}, like=x)
    outer = build.op("Shape", [x], {"start": 0, "end": -1})
    shape = build.op("Concat", [outer, build.ints([rows])], {"axis": 0})
    return build.op("Reshape", [made, shape])


MATMUL_N_BITS = OnnxOperator("MatMulNBits", _n_bits)
DEQUANTIZE_LINEAR = OnnxOperator("DequantizeLinear", _dequantize, dequantizes=True)
STANDARD_OPERATORS = (MATMUL_N_BITS, DEQUANTIZE_LINEAR)
"""Those that any format may name."""


def whole_numbers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, block: int, bits: int
) -> OnnxWeight | None:
    """``(code - zero) · scale`` in blocks along rows; None if the zero points are no whole numbers.

    Args:
        codes: int8 [out, in], from -8 to 7 for 4 bits.
        scales: [out, blocks], or one row for several rows of codes.
        zeros: Likewise; None for none.
        block: Values of a row that share a scale.
        bits: 4 or 8.
    """
    rows, columns = codes.shape
    scales = _spread(scales, rows).float()
    zeros = None if zeros is None else _spread(zeros, rows)
    if zeros is not None and not bool((zeros == zeros.round()).all()):
        return None
    size = next((size for size in _OPERATOR_BLOCKS if block % size == 0), None)
    if bits == 4 and size is None and block == columns:
        size = _OPERATOR_BLOCKS[-1]  # one scale a row: the last block need not be full
    if bits == 4 and size is not None:
        return _blocks_of_four_bits(codes, scales, zeros, size)
    if zeros is not None:
        zeros = zeros.to(torch.int8).flatten() if bool(zeros.any()) else None
    lines = codes.reshape(-1, block)
    return OnnxWeight(DEQUANTIZE_LINEAR, lines, scales.flatten(), zeros, block)


def _blocks_of_four_bits(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, size: int
) -> OnnxWeight:
    rows, columns = codes.shape
    blocks = -(-columns // size)
    # Codes from -8 to 7 are stored from 0 to 15; without zero points the middle is 8.
    kept = F.pad((codes + 8).to(torch.uint8), (0, blocks * size - columns), value=8)
    # A block of the library is several of the operator's, or a row that they do not fill.
    scales = scales.repeat_interleave(-(-blocks // scales.shape[1]), 1)
    if zeros is not None and bool(zeros.any()):
        zeros = zeros.repeat_interleave(-(-blocks // zeros.shape[1]), 1)
        zeros = _packed_pairs(F.pad((zeros + 8).to(torch.uint8), (0, blocks % 2), value=8))
    else:
        zeros = None
    pairs = _packed_pairs(kept).view(rows, blocks, size // 2)
    return OnnxWeight(MATMUL_N_BITS, pairs, scales, zeros, size, fresh=True)


def _packed_pairs(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first in the lower half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _spread(value: Tensor, rows: int) -> Tensor:
    """What there is one of for each block, [rows, blocks]: a block may be several rows."""
    return value.repeat_interleave(rows // value.shape[0], 0)
