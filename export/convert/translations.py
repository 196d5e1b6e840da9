"""Operations that torch.onnx cannot translate, and what they are in ONNX.

A product with one matrix for each group of rows (the experts of a mixture) has no ONNX operator. It is
translated in two steps: here into a node of our own, and after torch.onnx has folded its constants into
ONNX (:mod:`lora_fx.export.convert.grouped`), when it is known whether the matrices are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import lora_fx.export.copy.packed_weight  # noqa: F401  # both register operators that are translated here
import lora_fx.runtime.experts

__all__ = ["DOMAIN", "GROUPED_MATMUL", "QUANTIZED_PRODUCT", "translation_table"]

DOMAIN = "lora_fx"
GROUPED_MATMUL = "GroupedMatMul"
QUANTIZED_PRODUCT = "QuantizedProduct"

_FLOAT, _INT32, _BOOL = 1, 6, 9  # of onnx.TensorProto
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def translation_table(program: ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator of PyTorch to its translation, for ``torch.onnx.export``.

    Operators of libraries are in it if the library has registered them.

    Args:
        program: What is translated: torch.onnx keeps its own translation of what it can translate.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.histc.default: _histc,
        torch.ops.aten._grouped_mm.default: _grouped_mm,
        torch.ops.lora_fx.grouped_linear.default: _grouped_linear,
        torch.ops.lora_fx.quantized_product.default: _quantized_product,
        torch.ops.aten._is_all_true.default: _is_all_true,
        torch.ops.aten._is_any_true.default: _is_any_true,
    }
    attention = torch.ops.aten.scaled_dot_product_attention.default
    if any(_axes(node) != 4 for node in program.graph.nodes if node.target is attention):
        table[attention] = _attention
    # What transformers calls in place of aten._grouped_mm where a compiler cannot have that.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        table[fallback.default] = _grouped_mm_fallback
    return table


def _grouped_mm_fallback(input: Any, weight: Any, offs: Any) -> Any:  # noqa: A002
    return _grouped(input, weight, offs)


def _grouped_linear(x: Any, weight: Any, ends: Any) -> Any:
    """The factors of experts, which are stored [E, out, in]."""
    from onnxscript import opset18 as op

    return _grouped(x, op.Transpose(weight, perm=[0, 2, 1]), ends)


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
        type_constraints=[("T", _FLOATS, ""), ("I", ["tensor(int32)", "tensor(int64)"], "")],
    )
    return values.Op(values.Opset(DOMAIN, 1), GROUPED_MATMUL, schema)(rows, matrices, ends)


def _quantized_product(
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    operator: str,
    rows: int,
    columns: int,
    block: int,
    scheme: str,
) -> Any:
    """A product with a quantised weight, which :mod:`lora_fx.export.convert.quantized_nodes` takes apart."""
    import onnx
    from onnxscript import values

    schemas = onnx.defs.OpSchema
    parameter, attribute, kind = schemas.FormalParameter, schemas.Attribute, schemas.AttrType
    codes_of, optional = ["tensor(uint8)", "tensor(int8)"], schemas.FormalParameterOption.Optional
    schema = schemas(
        QUANTIZED_PRODUCT,
        DOMAIN,
        1,
        inputs=[
            parameter("x", "T"),
            parameter("codes", "C"),
            parameter("scales", "S"),
            parameter("zeros", "C", param_option=optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", _FLOATS, ""), ("S", _FLOATS, ""), ("C", codes_of, "")],
        attributes=[
            *(attribute(name, kind.STRING) for name in ("operator", "scheme")),
            *(attribute(name, kind.INT) for name in ("rows", "columns", "block")),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), QUANTIZED_PRODUCT, schema)(
        x,
        codes,
        scales,
        zeros,
        operator=operator,
        scheme=scheme,
        rows=rows,
        columns=columns,
        block=block,
    )


def _axes(node: fx.Node) -> int:
    """How many a result has."""
    return int(node.meta["val"].ndim)


def _is_all_true(self: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Cast(op.ReduceMin(op.Cast(self, to=_INT32), keepdims=0), to=_BOOL)


def _is_any_true(self: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Cast(op.ReduceMax(op.Cast(self, to=_INT32), keepdims=0), to=_BOOL)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``F.scaled_dot_product_attention`` with any number of axes: softmax(scale · q kᵀ + mask) v."""
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops import nn

    if len(query.shape) == 4:
        return nn.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    if enable_gqa or dropout_p:
        raise NotImplementedError(
            f"attention over {len(query.shape)} axes is translated without grouped queries and dropout"
        )
    axes = list(range(len(key.shape)))
    swapped = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    size = query.shape[-1]
    factor = op.Constant(value_float=float(size**-0.5 if scale is None else scale))
    scores = op.MatMul(op.Mul(query, op.CastLike(factor, query)), swapped)
    if is_causal:
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(scores, start=-2))
        allowed = op.Cast(op.Trilu(ones, upper=0), to=_BOOL)
        scores = op.Where(allowed, scores, op.CastLike(op.Constant(value_float=-inf), scores))
    elif attn_mask is not None and attn_mask.dtype == _BOOL:
        scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=-inf), scores))
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _histc(input: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:  # noqa: A002
    """``torch.histc`` with fixed limits: the last bin has its upper edge, what is outside is not counted."""
    from onnxscript import opset18 as op

    if min == max:
        raise NotImplementedError("histc takes its limits from the input here: give min and max")
    flat = op.Reshape(input, op.Constant(value_ints=[-1]))
    wide = op.Cast(flat, to=_FLOAT)
    low, high = op.Constant(value_float=float(min)), op.Constant(value_float=float(max))
    place = op.Floor(op.Mul(op.Sub(wide, low), op.Constant(value_float=bins / (max - min))))
    place = op.Min(place, op.Constant(value_float=float(bins - 1)))
    inside = op.And(op.GreaterOrEqual(wide, low), op.LessOrEqual(wide, high))
    place = op.Where(inside, place, op.Constant(value_float=-1.0))
    every = op.Constant(value_floats=[float(index) for index in range(bins)])
    column = op.Unsqueeze(place, op.Constant(value_ints=[1]))
    hits = op.CastLike(op.Equal(column, every), input)
    return op.ReduceSum(hits, op.Constant(value_ints=[0]), keepdims=0)
