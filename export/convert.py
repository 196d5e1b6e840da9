"""Conversion of an exported program to an ONNX graph that is ready to ship."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_fx.export.copy  # noqa: F401  # it registers operators that are translated here
from lora_fx import torch_private
from lora_fx.errors import ExportError
from lora_fx.export.adapter_bank import constant_tensor, make_bank_overridable
from lora_fx.export.adapter_manifest import MANIFEST_KEY, Manifest
from lora_fx.export.arguments import FlatModel
from lora_fx.export.failures import SourceLocation, headline, inner_module, place_of, user_line
from lora_fx.export.mixtures import MARK, MARK_DOMAIN, Mixture
from lora_fx.export.ort import AXIS_LIMITS_KEY, INNER_SIZES_KEY, inner_sizes
from lora_fx.export.prepare import Prepared
from lora_fx.export.providers import RUNTIME_KEY
from lora_fx.export.trace import Trace
from lora_fx.formats import CONTRIB, operator_named
from lora_fx.ir import OnnxProduct
from lora_fx.versions import installed

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "ConversionError",
    "convert",
    "expand_grouped",
    "expand_quantized",
    "shield_half_inputs",
    "shield_padded_pools",
    "torch_export_context",
    "translation_table",
]

# --- operators that torch.onnx lacks --------------------------------------------------------------
# Translations of operators that torch.onnx lacks, and of lora-fx's own nodes.
#
# torch.onnx has no translation of a grouped product, and its optimizer would fold a
# ``DequantizeLinear`` over a small weight into a dense constant. So both become one node of lora-fx,
# which is expanded afterwards. The format of a quantized weight decides which nodes its product
# becomes (:class:`lora_fx.ir.OnnxOperator`).


_DOMAIN = "lora_fx"
_GROUPED_MATMUL = "GroupedMatMul"
_QUANTIZED_PRODUCT = "QuantizedProduct"
_GROUPED_QUANTIZED_PRODUCT = "GroupedQuantizedProduct"

_FLOAT, _INT32, _BOOL = 1, 6, 9  # of onnx.TensorProto
_INTEGERS = ["tensor(int32)", "tensor(int64)"]
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]


def translation_table(program: ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Map operators of PyTorch to their translations, for ``torch.onnx.export``.

    An operator of a library is included if the library has registered it.

    Args:
        program: The program to translate. Attention is included only if torch.onnx cannot translate it.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.histc.default: _histc,
        torch_private.GROUPED_MM: _grouped_mm,
        torch.ops.lora_fx.grouped_linear.default: _grouped_linear,
        torch.ops.lora_fx.quantized_product.default: _quantized_product,
        torch.ops.lora_fx.grouped_quantized_product.default: _quantized_product,
        torch.ops.lora_fx.mixture.default: _mixture,
        torch_private.IS_ALL_TRUE: _is_all_true,
        torch_private.IS_ANY_TRUE: _is_any_true,
    }
    attention = torch.ops.aten.scaled_dot_product_attention.default
    if any(node.meta["val"].ndim != 4 for node in program.graph.nodes if node.target is attention):
        table[attention] = _attention
    # transformers calls this operator if a compiler cannot use aten._grouped_mm.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        table[fallback.default] = _grouped_mm_fallback
    return table


def _grouped_mm_fallback(input: Any, weight: Any, offs: Any) -> Any:  # noqa: A002
    return _grouped(input, weight, offs)


def _grouped_linear(x: Any, weight: Any, ends: Any) -> Any:
    """Translate a product with the factors of experts, which are stored [E, out, in]."""
    from onnxscript import opset18 as op

    return _grouped(x, op.Transpose(weight, perm=[0, 2, 1]), ends)


def _grouped_mm(
    self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: int = -1
) -> Any:
    if offs is None or bias is not None or len(self.shape) != 2 or len(mat2.shape) != 3:
        raise NotImplementedError(
            "a grouped product is translated for rows in groups [rows, in] and matrices "
            "[groups, in, out], without bias"
        )
    return _grouped(self, mat2, offs)


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
        type_constraints=[("T", _FLOATS, ""), ("I", _INTEGERS, "")],
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
    ends: Any = None,
) -> Any:
    """Translate a product with a quantized weight to a node that :func:`expand_quantized` expands.

    With ``ends`` it is a grouped product, which :func:`expand_grouped` splits first.
    """
    import onnx
    from onnxscript import values

    schemas = onnx.defs.OpSchema
    parameter, attribute, kind = schemas.FormalParameter, schemas.Attribute, schemas.AttrType
    codes_of, optional = ["tensor(uint8)", "tensor(int8)"], schemas.FormalParameterOption.Optional
    name = _QUANTIZED_PRODUCT if ends is None else _GROUPED_QUANTIZED_PRODUCT
    schema = schemas(
        name,
        _DOMAIN,
        1,
        inputs=[
            parameter("x", "T"),
            parameter("codes", "C"),
            parameter("scales", "S"),
            parameter("zeros", "C", param_option=optional),
            parameter("ends", "I", param_option=optional),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[
            ("T", _FLOATS, ""),
            ("S", _FLOATS, ""),
            ("C", codes_of, ""),
            ("I", _INTEGERS, ""),
        ],
        attributes=[
            *(attribute(name, kind.STRING) for name in ("operator", "scheme")),
            *(attribute(name, kind.INT) for name in ("rows", "columns", "block")),
        ],
    )
    inputs = (x, codes, scales, zeros) if ends is None else (x, codes, scales, zeros, ends)
    return values.Op(values.Opset(_DOMAIN, 1), name, schema)(
        *inputs,
        operator=operator,
        scheme=scheme,
        rows=rows,
        columns=columns,
        block=block,
    )


def _mixture(*arguments: Any) -> Any:
    """Translate a mark of :mod:`lora_fx.export.mixtures` to a node, which fusions read and then remove."""
    import onnx
    from onnxscript import values

    schemas = onnx.defs.OpSchema
    optional = schemas.FormalParameterOption.Optional
    # Each input has a type of its own.
    inputs = [
        schemas.FormalParameter(name, f"T{index}", param_option=optional)
        for index, name in enumerate(Mixture._fields)
    ]
    kinds = [*_FLOATS, *_INTEGERS, "tensor(uint8)"]
    schema = schemas(
        MARK,
        MARK_DOMAIN,
        1,
        inputs=inputs,
        outputs=[schemas.FormalParameter("marked", "T0")],
        type_constraints=[(f"T{index}", kinds, "") for index in range(len(inputs))],
    )
    return values.Op(values.Opset(MARK_DOMAIN, 1), MARK, schema)(*arguments)


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
    """Translate ``F.scaled_dot_product_attention`` over any axes: softmax(scale · q kᵀ + mask) v."""
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
    """Translate ``torch.histc`` with fixed limits. The last bin includes its upper edge."""
    from onnxscript import opset18 as op

    if min == max:
        raise NotImplementedError("histc takes its limits from the input here: give min and max")
    flat = op.Reshape(input, op.Constant(value_ints=[-1]))
    wide = op.Cast(flat, to=_FLOAT)
    low, high = op.Constant(value_float=float(min)), op.Constant(value_float=float(max))
    bin_index = op.Floor(op.Mul(op.Sub(wide, low), op.Constant(value_float=bins / (max - min))))
    bin_index = op.Min(bin_index, op.Constant(value_float=float(bins - 1)))
    inside = op.And(op.GreaterOrEqual(wide, low), op.LessOrEqual(wide, high))
    bin_index = op.Where(inside, bin_index, op.Constant(value_float=-1.0))
    all_bins = op.Constant(value_floats=[float(index) for index in range(bins)])
    column = op.Unsqueeze(bin_index, op.Constant(value_ints=[1]))
    hits = op.CastLike(op.Equal(column, all_bins), input)
    return op.ReduceSum(hits, op.Constant(value_ints=[0]), keepdims=0)


def expand_grouped(model: ir.Model) -> None:
    """Replace every grouped product, such as of experts, by a split and a product for each group.

    Args:
        model: Changed in place. Its weights have their final names.
    """
    nodes = [
        node
        for node in model.graph.all_nodes()
        if node.domain == _DOMAIN and node.op_type in (_GROUPED_MATMUL, _GROUPED_QUANTIZED_PRODUCT)
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

    rows, *arrays, ends = node.inputs
    weight = arrays[0]
    assert rows is not None
    assert weight is not None
    assert ends is not None
    assert weight.shape is not None
    quantized = node.op_type == _GROUPED_QUANTIZED_PRODUCT
    groups = weight.shape[0]
    inner, width = (_int(node, "columns"), _int(node, "rows")) if quantized else weight.shape[1:]
    assert isinstance(groups, int)
    tape = ir.tape.Tape()
    if ends not in sizes:
        sizes[ends] = _sizes(tape, rows, ends)
    # Rows after the last group belong to no expert. Their result is zero, as in PyTorch.
    parts = tape.op_multi_out(
        "Split", [rows, sizes[ends]], {"axis": 0}, num_outputs=groups + 1, name=node.name
    )
    for array in arrays:
        if array is not None and array not in known:
            known[array] = _matrices(tape, array, groups)
    absent = [None] * groups
    operands = zip(*(absent if array is None else known[array] for array in arrays), strict=True)
    name, attributes, domain = (
        (_QUANTIZED_PRODUCT, dict(node.attributes), _DOMAIN) if quantized else ("MatMul", {}, "")
    )
    products = [
        tape.op(name, [part, *operand], attributes, domain=domain)
        for part, operand in zip(parts[:-1], operands, strict=True)
    ]
    count = tape.op("Shape", [parts[-1]], {"start": 0, "end": 1})
    last = _ints(tape, [width]) if quantized else _size(tape, weight, 2)
    shape = tape.op("Concat", [count, last], {"axis": 0})
    nothing = tape.op("CastLike", [_constant(tape, 0.0), rows])
    tail = tape.op("Expand", [nothing, shape])
    joined = tape.op("Concat", [*products, tail], {"axis": 0})
    for value in (joined, *products):
        value.dtype = rows.dtype
    for value in products:
        value.shape = ir.Shape([None, width])
    for part in parts:
        part.dtype, part.shape = rows.dtype, ir.Shape([None, inner])
    _replace(node, tape, joined)


def _replace(node: ir.Node, tape: ir.tape.Tape, output: ir.Value) -> None:
    """Replace a node by the new nodes on a tape, and the output of the node by ``output``."""
    import onnx_ir as ir

    for tape_node in tape.nodes:
        tape_node.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], tape.nodes, node.outputs, [output]
    )


def _sizes(tape: Any, rows: ir.Value, ends: ir.Value) -> ir.Value:
    """Return a vector with the number of rows of each group, and of the rows after the last group."""
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
    """Return the size of one axis as a tensor: a constant, or a ``Shape`` if only a run knows the size."""
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
    """Replace every product with a quantized weight by the nodes of its format.

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
            tuple(array for array in arrays if array is not None),
            rows=_int(node, "rows"),
            columns=_int(node, "columns"),
            block=_int(node, "block"),
            scheme=_text(node, "scheme"),
        )
        operator = operator_named(_text(node, "operator"))
        output = operator.nodes(_Builder(tape, node.name), product)
        _replace(node, tape, output)
    if any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.opset_imports[CONTRIB] = 1


class _Builder:
    """Builder of nodes on a tape: an :class:`lora_fx.ir.OnnxBuilder`."""

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
        value = self._tape.op(name, inputs, attributes)
        return value if like is None else _typed(value, like)

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
        value = self._tape.op(name, inputs, attributes, domain=domain, name=self._name)
        return value if like is None else _typed(value, like)

    def ints(self, numbers: Sequence[int]) -> Any:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        return self._tape.op("Constant", [], {"value_ints": list(numbers)})

    def rank(self, value: Any) -> int:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        assert value.shape is not None
        return len(value.shape)

    def same_dtype(self, first: Any, second: Any) -> bool:
        """See :class:`lora_fx.ir.OnnxBuilder`."""
        return bool(first.dtype == second.dtype)


def _typed(value: Any, like: Any) -> Any:
    value.dtype = like.dtype
    return value


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _text(node: ir.Node, name: str) -> str:
    return str(node.attributes[name].as_string())


# --- the conversion -------------------------------------------------------------------------------


# An exported file has names that the user knows, and nothing about the build machine.
#
# torch.onnx calls a weight by its FQN until it folds a transpose into it, and leaves stack traces
# with absolute paths on every node. Here inputs, outputs, weights and axes get the names that a user
# would look for, in that order of precedence. Other metadata is removed.

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"


def _weight_aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the FQN of every parameter and buffer to all FQNs of the same tensor, itself included."""
    names: dict[int, list[str]] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _name_values(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    aliases: Mapping[str, tuple[str, ...]],
    prefix: str,
) -> None:
    """Give inputs and outputs their names and every weight its FQN.

    A weight that is stored transposed gets the FQN too. If a tied weight is stored both ways, the
    transposed one gets another of its FQNs, or the FQN with ``.T``. If an input or output already has
    the name, the weight gets a number as a suffix.

    Args:
        model: Changed in place.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order; made unique if they are not.
        aliases: The result of ``_weight_aliases`` for the exported model.
        prefix: Prefix of the FQNs in ``model``.
    """
    from onnx_ir.passes.common import NameFixPass

    graph = model.graph
    wanted = _weight_names(graph, aliases, prefix)
    # Two steps, because a name is free only after its current owner is renamed.
    for index, initializer in enumerate(list(graph.initializers.values())):
        wanted.setdefault(initializer, initializer.name or "constant")
        initializer.name = f"__lora_fx_{index}"
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for initializer, name in wanted.items():
        if not initializer.is_graph_output():
            initializer.name = _free(name, taken)
            taken.add(initializer.name)
    NameFixPass()(model)


def _name_axes(
    model: ir.Model, shapes: Sequence[Sequence[int | str]], symbols: Mapping[str, str]
) -> None:
    """Write the axes of the inputs and rename torch's symbols in all other shapes.

    Args:
        model: Changed in place.
        shapes: Sizes and axis names of each input.
        symbols: Map from torch's symbol to the name of the axis.
    """
    import onnx_ir as ir

    for value, axes in zip(model.graph.inputs, shapes, strict=True):
        value.shape = ir.Shape(axes)
    known = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for value in _values(model):
        if value.shape is None or known is None:
            continue
        value.shape = ir.Shape([_renamed(dim, known, symbols) for dim in value.shape])


def _strip_build_traces(model: ir.Model, prefix: str) -> None:
    """Remove stack traces, documentation and metadata; keep each node's module scope.

    Args:
        model: Changed in place.
        prefix: Prefix of the scopes, removed too.
    """
    model.doc_string = None
    model.metadata_props.clear()
    for graph in _graphs(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            scopes = _scopes(node.metadata_props.get(_SCOPES, ""), prefix)
            node.doc_string = None
            node.metadata_props.clear()
            if scopes:
                node.metadata_props[_SCOPES] = repr(scopes)
    for value in _values(model):
        value.doc_string = None
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            if value.const_value.doc_string:  # read-only on a tensor that is read from a proto
                value.const_value.doc_string = None


def _weight_names(
    graph: ir.Graph, aliases: Mapping[str, tuple[str, ...]], prefix: str
) -> dict[ir.Value, str]:
    wanted: dict[ir.Value, str] = {}
    folded: list[tuple[ir.Value, str]] = []
    for initializer in graph.initializers.values():
        own = (initializer.name or "").removeprefix(prefix)
        if own in aliases:
            wanted[initializer] = _first_free(aliases[own], wanted.values()) or own
            continue
        sources = _literal(initializer.metadata_props.get(_FOLDED_FROM, ""))
        if len(sources) == 1 and sources[0].removeprefix(prefix) in aliases:
            folded.append((initializer, sources[0].removeprefix(prefix)))
    for initializer, source in folded:
        names = (source, *aliases[source])
        wanted[initializer] = _first_free(names, wanted.values()) or f"{source}.T"
    return wanted


def _first_free(names: Sequence[str], taken: object) -> str | None:
    used = set(taken)  # type: ignore[call-overload]
    return next((name for name in names if name not in used), None)


def _free(name: str, taken: set[str | None]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _literal(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


def _scopes(text: str, prefix: str) -> list[str]:
    root = prefix.removesuffix(".")
    scopes = [scope for scope in _literal(text) if scope]
    return ["" if scope == root else scope.removeprefix(prefix) for scope in scopes]


def _renamed(
    dim: int | ir.SymbolicDim, known: re.Pattern[str], symbols: Mapping[str, str]
) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return known.sub(lambda match: symbols[match[0]], dim.value) if dim.value else None


def _graphs(model: ir.Model) -> list[Any]:
    return [model.graph, *model.functions.values()]


def _values(model: ir.Model) -> list[ir.Value]:
    values: dict[ir.Value, None] = {}
    for graph in _graphs(model):
        values.update(dict.fromkeys(graph.inputs))
        values.update(dict.fromkeys(graph.outputs))
        values.update(dict.fromkeys(getattr(graph, "initializers", {}).values()))
        for node in graph.all_nodes():
            values.update(dict.fromkeys(node.outputs))
    return list(values)


# The first logger warns of empty lists that torchlib itself writes.
_LOGGERS = (
    "onnx_ir._convenience",
    *torch_private.CHATTY_LOGGERS,
)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Silence printed graphs and warnings that a user cannot act on, inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # The tracer prints the graph so far, once for each of its wrappers. The replacement affects only
    # that module, and exports run one at a time.
    tracer = vars(torch_private.export_tracer())
    tracer["print"] = _nothing
    try:
        yield
    finally:
        tracer.pop("print", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nothing(*_: object, **__: object) -> None:
    """Do nothing, in place of ``print``."""


def _repaired(program: ExportedProgram) -> ExportedProgram:
    """Replace operations that torch.onnx cannot translate by equivalent operations.

    Args:
        program: Result of ``torch.export``. Its graph is changed in place.

    Returns:
        The program.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in _REPAIRED:
            _repair(node)
    program.graph_module.recompile()
    return program


_ATEN = torch.ops.aten
_SQUEEZED = _ATEN.squeeze.dim, _ATEN.squeeze.dims
_REPAIRED = (_ATEN.unsqueeze.default, *_SQUEEZED, _ATEN.rsub.Scalar)
"""Operators that torch.onnx cannot translate in some calls."""


def _repair(node: fx.Node) -> None:
    """Rewrite a call of an operator in ``_REPAIRED`` if torch.onnx cannot translate this call."""
    x, value = node.all_input_nodes[0], node.meta["val"]
    before = x.meta["val"]
    if node.target is _ATEN.unsqueeze.default and value.is_complex():
        # Rotary embeddings with complex numbers (Llama 4, DeepSeek-V2).
        tensor, axis = node.args
        node.target, node.args = _ATEN.stack.default, ([tensor], axis)
    elif node.target in _SQUEEZED and value.ndim == before.ndim:
        # PyTorch leaves axes of other sizes than 1 as they are (PixArt), and ONNX refuses them.
        node.target, node.args = _ATEN.clone.default, (x,)
    elif node.target is _ATEN.rsub.Scalar and value.dtype != before.dtype:
        # 1.0 minus a mask of whole numbers: torch.onnx takes no number that changes the dtype.
        with node.graph.inserting_before(node):
            cast = node.graph.call_function(_ATEN.to.dtype, (x, value.dtype))
        cast.meta = {**x.meta, "val": before.to(value.dtype)}
        node.replace_input_with(x, cast)


_DROPOUTS = (
    _ATEN.dropout.default,
    _ATEN.feature_dropout.default,
    _ATEN.alpha_dropout.default,
    _ATEN.feature_alpha_dropout.default,
)
_RANDOM_OPS = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_REMEDY = (
    "Was its graph captured in train mode, or does it call F.dropout without "
    "training=self.training? Capture it in eval mode, or export the module that it was made from"
)


def _refuse_train_mode(program: ExportedProgram, prefix: str) -> None:
    """Raise if a program has train-mode operations although the model is in eval mode.

    Args:
        program: The trace of the model.
        prefix: Prefix of the FQNs of its modules.

    Raises:
        ExportError: The message names the operation, its module and its line.
    """
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _DROPOUTS and _argument(node, 2) is True and _argument(node, 1) != 0.0:
            location = place_of(node, prefix)
            raise ExportError(f"the model is random in eval mode: Dropout: {location}. {_REMEDY}")
        # A batch norm without running statistics uses the statistics of the batch in both modes.
        if (
            node.target is _ATEN.batch_norm.default
            and _argument(node, 5) is True
            and _argument(node, 3) is not None
        ):
            location = place_of(node, prefix)
            raise ExportError(
                f"the model trains its batch norm in eval mode: {location}. {_REMEDY}"
            )


def _refuse_randomness(model: ir.Model, prefix: str) -> None:
    """Raise if a converted graph has random operations.

    Args:
        model: The graph, with the traces that torch.onnx leaves on its nodes.
        prefix: Prefix of the FQNs of its modules.

    Raises:
        ExportError: The message names the operation, its module and its line.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in _RANDOM_OPS:
            continue
        traces = node.metadata_props
        scopes = ast.literal_eval(traces.get("pkg.torch.onnx.name_scopes", "[]"))
        location = SourceLocation(
            str(node.op_type),
            inner_module(scopes[:-1], prefix),  # the last scope is the operation
            user_line(traces.get("pkg.torch.onnx.stack_trace", "")),
        )
        raise ExportError(f"the model is random in eval mode: {location}. {_REMEDY}")


def _argument(node: fx.Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else None


def _make_overridable(
    model: ir.Model, manifest: Manifest, defaults: Mapping[str, torch.Tensor]
) -> None:
    """Give adapter inputs their defaults, with which the file runs as the base model.

    An input without a value in ``defaults`` stays required.
    The default is zeros of rank 1 (a gain of 1), see :attr:`SiteInputs.least_rank`: a product with them is
    zero and costs next to nothing. A parameter has the base's values. No other initializer is an input,
    because an optimizer does not treat such a value as a constant, and the weights must stay constants.

    Args:
        model: Changed in place. Its inputs have the names of the manifest.
        manifest: The adapter inputs.
        defaults: The defaults by name.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name in manifest.inputs:
        value = inputs[name]
        if name in defaults:
            value.const_value = constant_tensor(name, defaults[name])
            model.graph.register_initializer(value)
        _feed_as_stored(value)


def _input_with_rows(trace: Trace) -> str:
    """Return the name of the first input whose first axis is the batch, for a file with a bank.

    Raises:
        ExportError: The size of the batch is fixed, which a bank does not support. The message says why.
    """
    pairs = zip(trace.arguments.names, trace.axes, strict=True)
    name, first = next((name, axes[0]) for name, axes in pairs if axes)
    if first.name is None:
        raise ExportError(
            f"a bank of adapters needs a batch of any size, and it is fixed: {first.reason}. Export with "
            "adapters='inputs', which runs one adapter for the whole batch"
        )
    return name


def _feed_as_stored(value: ir.Value) -> None:
    """Let each Gemm read a factor directly, not through a ``Transpose``: flip ``transA`` or ``transB``."""
    import onnx_ir as ir

    for node, _ in list(value.uses()):
        if node.op_type != "Transpose" or list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
            continue
        for gemm, position in list(node.outputs[0].uses()):
            if gemm.op_type == "Gemm" and position < 2:
                flag = ("transA", "transB")[position]
                turned = 1 - gemm.attributes.get_int(flag, 0)
                gemm.attributes.add(ir.AttrInt64(flag, turned))
                gemm.replace_input_with(position, value)
        if not list(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)


def shield_padded_pools(model: ir.Model) -> None:
    """Replace the zeros of a Pad before a MaxPool by -0.0, so that ONNX Runtime does not fuse the two.

    The fusion (``Pad_Fusion``; microsoft/onnxruntime#24737) moves the padding into the MaxPool, which pads
    with the lowest number instead of zero. The maximum of negative values would then be wrong. The fusion
    compares the bits of the value with 0.0, and so ignores -0.0.

    Args:
        model: Changed in place, after all fusions.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers
    for node in list(model.graph):
        x = node.inputs[0] if node.op_type == "MaxPool" else None
        pad = None if x is None else x.producer()
        if pad is None or pad.op_type != "Pad" or x is None or x.dtype is None:
            continue
        value = pad.inputs[2] if len(pad.inputs) > 2 else None
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if value is not None and (constant is None or constant.numpy().any()):
            continue
        name = f"lora_fx.zero_{x.dtype.name.lower()}"
        if name not in initializers:
            tensor = ir.tensor(np.array(-0.0, x.dtype.numpy()), dtype=x.dtype, name=name)
            zero = ir.Value(name=name, const_value=tensor, type=ir.TensorType(x.dtype))
            zero.shape = ir.Shape([])
            model.graph.register_initializer(zero)
        pad.resize_inputs(max(3, len(pad.inputs)))
        pad.replace_input_with(2, initializers[name])
        if value is not None and value.is_initializer() and not value.uses():
            del initializers[value.name]


def shield_half_inputs(model: ir.Model) -> None:
    """Read every adapter input in fp16 through a Reshape to its own shape.

    If a CPU has no kernel in fp16, ONNX Runtime casts the operator's inputs to fp32. Its versions 1.23 to
    1.28 treat a cast initializer as a constant, and abort the process if it is an input as well
    (``FuseFp16InitializerToFp32NodeTransformer``; microsoft/onnxruntime#32143). A Reshape has a kernel in
    fp16 and copies nothing.

    Args:
        model: Changed in place, after all fusions.
    """
    import onnx_ir as ir

    graph = model.graph
    shapes: dict[int, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT16 or value.const_value is None or value.shape is None:
            continue
        rank = len(value.shape)
        if rank not in shapes:
            same = ir.tensor(np.zeros(rank, np.int64), name=f"lora_fx.same_shape_{rank}")
            shapes[rank] = ir.Value(name=same.name, const_value=same)
            shapes[rank].shape, shapes[rank].dtype = ir.Shape([rank]), ir.DataType.INT64
            graph.register_initializer(shapes[rank])
        reshape = ir.node("Reshape", [value, shapes[rank]])
        out = reshape.outputs[0]
        out.name, out.dtype, out.shape = f"{value.name}.held", value.dtype, value.shape
        for user, position in list(value.uses()):
            if user is not reshape:
                user.replace_input_with(position, out)
        graph.insert_before(graph[0], reshape)


_FAILED_NODE = re.compile(r"Error when translating node %(?P<name>\w+)")


class ConversionError(ExportError):
    """Error for an exported program that cannot become a runnable ONNX file. Another export may work."""


def convert(
    trace: Trace, prepared: Prepared, opset: int, defaults: Mapping[str, torch.Tensor] = {}
) -> ir.Model:
    """Translate a trace to ONNX, and name the inputs, outputs, weights and axes of the result.

    Args:
        trace: The result of ``trace()`` for the model.
        prepared: The model, for the FQNs of its weights and the names of its outputs.
        opset: ONNX opset to write.
        defaults: The values of adapter inputs that the file holds: ``Prepared.defaults``.

    Raises:
        ExportError: torch.onnx has no translation for something, or the graph is random.
    """
    twin, outputs = prepared.model.model, prepared.outputs
    prefix = FlatModel.PREFIX
    _refuse_train_mode(trace.program, prefix)
    program = _translate(trace, len(outputs), opset)
    _refuse_randomness(program, prefix)
    _repair_folded_dtypes(program)
    _name_values(program, trace.input_names, outputs, _weight_aliases(twin), prefix)
    expand_grouped(program)
    expand_quantized(program)
    _name_axes(program, trace.labels(), {**trace.symbols, **trace.extra_symbols})
    _strip_build_traces(program, prefix)
    _stamp(program, trace, prepared, opset)
    manifest = prepared.manifest
    if manifest is not None:
        if manifest.bank is None:
            _make_overridable(program, manifest, defaults)
        else:
            make_bank_overridable(program, manifest, defaults, _input_with_rows(trace))
        program.metadata_props[MANIFEST_KEY] = manifest.to_json()
    return program


@contextmanager
def torch_export_context() -> Iterator[None]:
    """Set the attention backend, warnings and loggers that ``trace`` and ``convert`` both need."""
    # MATH: attention of the other backends has strides that decomposition loses. torch then refuses
    # views that it recorded itself (T5). The ONNX nodes are the same.
    with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]), _without_chatter():
        # torch uses its own deprecated names on every export.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|onnxscript")
        yield


def _translate(trace: Trace, outputs: int, opset: int) -> ir.Model:
    # Neutral names for now, because an output named like a parameter would give an invalid model.
    count = len(trace.input_names)
    try:
        with torch_export_context():
            program = torch.onnx.export(
                _repaired(trace.program),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[f"__lora_fx_input_{index}" for index in range(count)],
                output_names=[f"__lora_fx_output_{index}" for index in range(outputs)],
                custom_translation_table=translation_table(trace.program),
            )
    except Exception as error:
        raise ConversionError(_failure(trace, error)) from error
    assert program is not None
    return program.model


def _failure(trace: Trace, error: Exception) -> str:
    """Return the message of a torch.onnx error, with the operation, module and line that it concerns."""
    chain = [error]
    while isinstance(chain[-1].__cause__, Exception):
        chain.append(chain[-1].__cause__)
    matches = (_FAILED_NODE.search(str(link)) for link in chain)
    node = next((_decomposed(trace, match["name"]) for match in matches if match is not None), None)
    subject = "the model" if node is None else str(place_of(node, FlatModel.PREFIX))
    return (
        f"torch.onnx cannot convert {subject}: {headline(chain[-1])}. Compute it with other operations, "
        f"or leave it out of what is exported"
    )


def _decomposed(trace: Trace, name: str) -> fx.Node | None:
    # torch.onnx names a node of its own decomposition of the program, which it does not return.
    for program in (trace.program, trace.program.run_decompositions()):
        nodes: list[fx.Node] = [node for node in program.graph.nodes if node.name == name]
        if nodes:
            return nodes[0]
    return None


def _repair_folded_dtypes(model: ir.Model) -> None:
    # onnxscript folds batch norm into a bf16 layer with numpy, which leaves the weights in fp32.
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[0] is None:
            continue
        wanted = node.inputs[0].dtype
        for value in node.inputs[1:]:
            if value is None or value.const_value is None or wanted is None:
                continue
            if value.const_value.dtype != wanted:
                array = value.const_value.numpy().astype(wanted.numpy())
                value.const_value = ir.tensor(array, dtype=wanted, name=value.name)
                value.type = ir.TensorType(wanted)


def _stamp(model: ir.Model, trace: Trace, prepared: Prepared, opset: int) -> None:
    version = importlib.metadata.version("lora-fx")
    model.producer_name = "lora-fx"
    model.producer_version = version
    model.metadata_props.update(
        {
            "lora_fx.version": version,
            "lora_fx.opset": str(opset),
            RUNTIME_KEY: installed("onnxruntime")[1],
            "lora_fx.dtype": prepared.dtype,
            "lora_fx.dynamic_axes": json.dumps(trace.dynamic_axes()),
            AXIS_LIMITS_KEY: json.dumps(trace.axis_limits()),
            INNER_SIZES_KEY: json.dumps(inner_sizes(model)),
            **prepared.origin,
            **prepared.metadata,
        }
    )
