"""Operations that torch.onnx cannot translate, and what they are in ONNX.

A product with one matrix for each group of rows (the experts of a mixture) has no ONNX operator. It is
translated in two steps: here into a node of our own, and after torch.onnx has folded its constants into
ONNX (:mod:`lora_fx.export.grouped`), when it is known whether the matrices are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DOMAIN", "GROUPED_MATMUL", "translation_table"]

DOMAIN = "lora_fx"
GROUPED_MATMUL = "GroupedMatMul"


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator of PyTorch to its translation, for ``torch.onnx.export``.

    Operators of libraries are in it if the library has registered them.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.histc.default: _histc,
        torch.ops.aten._grouped_mm.default: _grouped_mm,
    }
    # What transformers calls in place of aten._grouped_mm where a compiler cannot have that.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        table[fallback.default] = _grouped_mm_fallback
    return table


def _grouped_mm_fallback(input: Any, weight: Any, offs: Any) -> Any:  # noqa: A002
    return _grouped(input, weight, offs)


def _grouped_mm(
    input: Any,  # noqa: A002
    weight: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: int | None = None,
) -> Any:
    if offs is None or bias is not None or len(input.shape) != 2 or len(weight.shape) != 3:
        raise NotImplementedError(
            "a grouped product is translated for rows in groups [rows, in] and matrices "
            "[groups, in, out], without bias"
        )
    return _grouped(input, weight, offs)


def _grouped(rows: Any, matrices: Any, ends: Any) -> Any:
    import onnx
    from onnxscript import values

    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        GROUPED_MATMUL,
        DOMAIN,
        1,
        inputs=[parameter("rows", "T"), parameter("matrices", "T"), parameter("ends", "I")],
        outputs=[parameter("products", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], ""),
            ("I", ["tensor(int32)", "tensor(int64)"], ""),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), GROUPED_MATMUL, schema)(rows, matrices, ends)


def _histc(input: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:  # noqa: A002
    """``torch.histc`` with fixed limits: the last bin has its upper edge, what is outside is not counted."""
    from onnxscript import opset18 as op

    if min == max:
        raise NotImplementedError("histc takes its limits from the input here: give min and max")
    flat = op.Reshape(input, op.Constant(value_ints=[-1]))
    wide = op.Cast(flat, to=1)
    low, high = op.Constant(value_float=float(min)), op.Constant(value_float=float(max))
    place = op.Floor(op.Mul(op.Sub(wide, low), op.Constant(value_float=bins / (max - min))))
    place = op.Min(place, op.Constant(value_float=float(bins - 1)))
    inside = op.And(op.GreaterOrEqual(wide, low), op.LessOrEqual(wide, high))
    place = op.Where(inside, place, op.Constant(value_float=-1.0))
    every = op.Constant(value_floats=[float(index) for index in range(bins)])
    column = op.Unsqueeze(place, op.Constant(value_ints=[1]))
    hits = op.CastLike(op.Equal(column, every), input)
    return op.ReduceSum(hits, op.Constant(value_ints=[0]), keepdims=0)
