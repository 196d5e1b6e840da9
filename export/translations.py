"""Translations of operators that torch.onnx lacks, and the nodes of lora-fx that go through it.

torch.onnx has no translation of a grouped product, and its optimizer would make a dense constant of a
``DequantizeLinear`` over a small weight. So both become one node of lora-fx, which is taken apart afterwards.
The format of a quantized weight says which nodes its product becomes (:class:`lora_fx.ir.OnnxOperator`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

import lora_fx.export.copy  # noqa: F401  # both register operators that are translated here
from lora_fx.formats import CONTRIB, operator_named
from lora_fx.ir import OnnxProduct

if TYPE_CHECKING:
    import onnx_ir as ir


__all__ = ["expand_grouped", "expand_quantized", "translation_table"]


_DOMAIN = "lora_fx"
_GROUPED_MATMUL = "GroupedMatMul"
_QUANTIZED_PRODUCT = "QuantizedProduct"

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
        _GROUPED_MATMUL,
        _DOMAIN,
        1,
        inputs=[parameter("rows", "T"), parameter("matrices", "T"), parameter("ends", "I")],
        outputs=[parameter("products", "T")],
        type_constraints=[("T", _FLOATS, ""), ("I", ["tensor(int32)", "tensor(int64)"], "")],
    )
    return values.Op(values.Opset(_DOMAIN, 1), _GROUPED_MATMUL, schema)(rows, matrices, ends)


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
    """A product with a quantized weight, which :func:`expand_quantized` takes apart."""
    import onnx
    from onnxscript import values

    schemas = onnx.defs.OpSchema
    parameter, attribute, kind = schemas.FormalParameter, schemas.Attribute, schemas.AttrType
    codes_of, optional = ["tensor(uint8)", "tensor(int8)"], schemas.FormalParameterOption.Optional
    schema = schemas(
        _QUANTIZED_PRODUCT,
        _DOMAIN,
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
    return values.Op(values.Opset(_DOMAIN, 1), _QUANTIZED_PRODUCT, schema)(
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


def expand_grouped(model: ir.Model) -> None:
    """Replace every grouped product.

    Args:
        model: Changed in place; its weights have their names.
    """
    nodes = [
        node
        for node in model.graph.all_nodes()
        if node.domain == _DOMAIN and node.op_type == _GROUPED_MATMUL
    ]
    known: dict[Any, list[ir.Value]] = {}
    ends: dict[Any, list[ir.Value]] = {}
    for node in nodes:
        _expand(node, known, ends)
    for weight in known:
        if weight.is_initializer() and not weight.uses():
            del weight.graph.initializers[weight.name]
    model.opset_imports.pop(_DOMAIN, None)


def _expand(node: ir.Node, known: dict[Any, Any], sizes: dict[Any, Any]) -> None:
    import onnx_ir as ir

    rows, weight, ends = node.inputs
    assert rows is not None
    assert weight is not None
    assert ends is not None
    assert weight.shape is not None
    (groups, _, width) = weight.shape
    assert isinstance(groups, int)
    tape = ir.tape.Tape()
    if ends not in sizes:
        sizes[ends] = _sizes(tape, rows, ends)
    # What is behind the last group belongs to no expert: zero, as PyTorch has it.
    parts = tape.op_multi_out(
        "Split", [rows, sizes[ends]], {"axis": 0}, num_outputs=groups + 1, name=node.name
    )
    if weight not in known:
        known[weight] = _matrices(tape, weight, groups)
    products = [
        tape.op("MatMul", [part, matrix])
        for part, matrix in zip(parts[:-1], known[weight], strict=True)
    ]
    count = tape.op("Shape", [parts[-1]], {"start": 0, "end": 1})
    shape = tape.op("Concat", [count, _size(tape, weight, 2)], {"axis": 0})
    nothing = tape.op("CastLike", [_constant(tape, 0.0), rows])
    rest = tape.op("Expand", [nothing, shape])
    joined = tape.op("Concat", [*products, rest], {"axis": 0})
    for value in (joined, *products):
        value.dtype = rows.dtype
    for value in products:
        value.shape = ir.Shape([None, width])
    for part in parts:
        part.dtype, part.shape = rows.dtype, ir.Shape([None, weight.shape[1]])
    _replace(node, tape, joined)


def _replace(node: ir.Node, tape: ir.tape.Tape, made: ir.Value) -> None:
    """Replaces a node by the nodes of a tape, whose output is ``made``."""
    import onnx_ir as ir

    for one in tape.nodes:
        one.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], tape.nodes, node.outputs, [made]
    )


def _sizes(tape: Any, rows: ir.Value, ends: ir.Value) -> ir.Value:
    """Rows in each group, and those behind the last."""
    wide = tape.op("Cast", [ends], {"to": 7})
    count = tape.op("Shape", [rows], {"start": 0, "end": 1})
    stops = tape.op("Concat", [wide, count], {"axis": 0})
    starts = tape.op("Concat", [_ints(tape, [0]), wide], {"axis": 0})
    sizes: ir.Value = tape.op("Sub", [stops, starts])
    return sizes


def _matrices(tape: Any, weight: ir.Value, groups: int) -> list[ir.Value]:
    import onnx_ir as ir

    if weight.const_value is None or not weight.is_initializer():
        return [
            tape.op("Gather", [weight, _constant(tape, index)], {"axis": 0})
            for index in range(groups)
        ]
    graph = weight.graph
    assert graph is not None
    array = weight.const_value.numpy()
    matrices = []
    for index in range(groups):
        tensor = ir.Tensor(array[index], dtype=weight.dtype, name=f"{weight.name}.{index}")
        matrix = ir.val(tensor.name, const_value=tensor)
        graph.register_initializer(matrix)
        matrices.append(matrix)
    return matrices


def _size(tape: Any, value: ir.Value, axis: int) -> Any:
    """A size as a tensor: a number, or, of a factor whose rank is not known, what it is then."""
    assert value.shape is not None
    size = value.shape[axis]
    if isinstance(size, int):
        return _ints(tape, [size])
    return tape.op("Shape", [value], {"start": axis, "end": axis + 1})


def _ints(tape: Any, values: list[int]) -> Any:
    return tape.op("Constant", [], {"value_ints": values})


def _constant(tape: Any, value: float) -> Any:
    key = "value_int" if isinstance(value, int) else "value_float"
    return tape.op("Constant", [], {key: value})


def expand_quantized(model: ir.Model) -> None:
    """Replaces every product with a quantized weight.

    Args:
        model: Changed in place.
    """
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        if node.domain != _DOMAIN or node.op_type != _QUANTIZED_PRODUCT:
            continue
        tape = ir.tape.Tape()
        x, *arrays = node.inputs
        product = OnnxProduct(
            x,
            tuple(one for one in arrays if one is not None),
            rows=_int(node, "rows"),
            columns=_int(node, "columns"),
            block=_int(node, "block"),
            scheme=_text(node, "scheme"),
        )
        operator = operator_named(_text(node, "operator"))
        made = operator.nodes(_Builder(tape, node.name), product)
        _replace(node, tape, made)
    if any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.opset_imports[CONTRIB] = 1


class _Builder:
    """Makes nodes on a tape: an :class:`lora_fx.ir.OnnxBuilder`."""

    def __init__(self, tape: ir.tape.Tape, name: str | None) -> None:
        self._tape = tape
        self._name = name

    def op(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: Any = None,
    ) -> Any:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        made = self._tape.op(name, inputs, attributes)
        return made if like is None else _typed(made, like)

    def product(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        like: Any = None,
    ) -> Any:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        made = self._tape.op(name, inputs, attributes, domain=domain, name=self._name)
        return made if like is None else _typed(made, like)

    def ints(self, numbers: Sequence[int]) -> Any:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        return self._tape.op("Constant", [], {"value_ints": list(numbers)})

    def rank(self, value: Any) -> int:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        assert value.shape is not None
        return len(value.shape)

    def same_dtype(self, one: Any, other: Any) -> bool:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        return bool(one.dtype == other.dtype)


def _typed(value: Any, like: Any) -> Any:
    value.dtype = like.dtype
    return value


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _text(node: ir.Node, name: str) -> str:
    return str(node.attributes[name].as_string())
