"""Products with quantised weights, in operators of ONNX and ONNX Runtime.

As with grouped products (:mod:`lora_fx.export.convert.grouped`), a node of our own goes through torch.onnx, whose
optimiser would make a dense constant of a ``DequantizeLinear`` over a small weight.

``MatMulBnb4`` and ``MatMulNBits`` are ONNX Runtime's own. A dequantised weight is read by a Gemm, not by a
MatMul: ONNX Runtime fuses ``DequantizeLinear → MatMul`` into a product that rounds its input to 8 bits (level
4 of ``session.qdq_matmulnbits_accuracy_level``, the default), which is off by 6e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_fx.export.convert.translations import DOMAIN, QUANTIZED_PRODUCT

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CONTRIB", "expand_quantized"]

CONTRIB = "com.microsoft"

_QUANT_TYPES = {"fp4": 0, "nf4": 1}


def expand_quantized(model: ir.Model) -> None:
    """Replaces every product with a quantised weight.

    Args:
        model: Changed in place.
    """
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN or node.op_type != QUANTIZED_PRODUCT:
            continue
        (result,) = node.outputs
        tape = ir.tape.Tape()
        made = _EXPANDED[_text(node, "operator")](tape, node)
        made.dtype, made.shape, made.name = result.dtype, result.shape, result.name
        result.name = None
        for one in tape.nodes:
            one.metadata_props.update(node.metadata_props)
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, tape.nodes)
        result.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    if any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.opset_imports[CONTRIB] = 1


def _bnb4(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    scheme = _text(node, "scheme")
    return tape.op(
        "MatMulBnb4",
        node.inputs[:3],
        {**_sizes(node), "quant_type": _QUANT_TYPES[scheme], "transB": 1},
        domain=CONTRIB,
        name=node.name,
    )


def _nbits(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    # Level 1: the product is computed in fp32, its input is not rounded to 8 bits.
    return tape.op(
        "MatMulNBits",
        _present(node),
        {**_sizes(node), "bits": 4, "accuracy_level": 1},
        domain=CONTRIB,
        name=node.name,
    )


def _dequantized(tape: ir.tape.Tape, node: ir.Node) -> ir.Value:
    x, rows, columns = node.inputs[0], _int(node, "rows"), _int(node, "columns")
    assert x is not None
    weight = tape.op("DequantizeLinear", _present(node)[1:], {"axis": 0})
    if _int(node, "block") != columns:
        weight = tape.op("Reshape", [weight, _ints(tape, [rows, columns])])
    if x.dtype != node.inputs[2].dtype:
        weight = tape.op("CastLike", [weight, x])
    assert x.shape is not None
    if len(x.shape) == 2:
        return tape.op("Gemm", [x, weight], {"transB": 1}, name=node.name)
    flat = tape.op("Reshape", [x, _ints(tape, [-1, columns])])
    product = tape.op("Gemm", [flat, weight], {"transB": 1}, name=node.name)
    outer = tape.op("Shape", [x], {"start": 0, "end": -1})
    shape = tape.op("Concat", [outer, _ints(tape, [rows])], {"axis": 0})
    for value in (flat, product):
        value.dtype = x.dtype
    return tape.op("Reshape", [product, shape])


_EXPANDED: dict[str, Callable[[Any, ir.Node], ir.Value]] = {
    "MatMulBnb4": _bnb4,
    "MatMulNBits": _nbits,
    "DequantizeLinear": _dequantized,
}


def _present(node: ir.Node) -> list[ir.Value | None]:
    """Its inputs, without zero points that there are none of."""
    return [value for value in node.inputs if value is not None]


def _sizes(node: ir.Node) -> dict[str, int]:
    return {
        "N": _int(node, "rows"),
        "K": _int(node, "columns"),
        "block_size": _int(node, "block"),
    }


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _text(node: ir.Node, name: str) -> str:
    return str(node.attributes[name].as_string())


def _ints(tape: ir.tape.Tape, values: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": values})
