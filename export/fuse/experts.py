"""Fusion of a mixture of experts into one operator, which reads the integers of all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_fx.export.copy import EXPERTS
from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    array_of,
    at_nodes,
    axis_size,
    consumers,
    made_by,
    names_of,
    nodes_of,
    remove_dead,
    scalar,
    sizes,
    substitute,
)
from lora_fx.export.mixtures import MARK, MARK_DOMAIN, Mixture, marked_mixture

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["EXPERTS_SINCE", "quantized_experts", "remove_marks"]


EXPERTS_SINCE = "1.31"
"""First version of ONNX Runtime whose CPU provider multiplies by the integers of experts directly.

Earlier versions dequantize every matrix in every call. They refuse the attribute ``accuracy_level``.
"""


class _Gate(NamedTuple):
    """The gate of an expert: ``g · sigmoid(alpha · g) · (l + beta)``, with ``g ≤ limit`` and ``|l| ≤ limit``.

    Attributes:
        rows: The rows of the matrix before the gate in the order g0, l0, g1, l1, …
        alpha: Factor in the sigmoid.
        beta: Summand of the linear half.
        limit: Limit of both halves, None for no limit.
    """

    rows: np.ndarray[Any, Any]
    alpha: float
    beta: float
    limit: float | None


@at_nodes(MARK, domain=MARK_DOMAIN)
def quantized_experts(model: ir.Model, node: ir.Node) -> bool | str:
    """Replace a mixture of 4-bit experts by ``QMoE``, with the same integers, scales and zero points.

    The operator of the CPU provider chooses the k experts with the highest values, and sums them with these
    values as weights. So it gets the weights of all experts, [T, E], with zeros for experts that were not
    chosen. It ignores weights up to 1e-8.
    """
    mixture = marked_mixture(node)
    gate = _read_gate(mixture.before, mixture.after)
    if gate is None:
        return "its gate is not g · sigmoid(a·g) · (l + b) of two halves"
    objection = _objection(mixture, gate)
    if objection:
        return objection
    builder = Builder(model, node)
    count, block = _sizes(mixture.up_codes)[0], 2 * _sizes(mixture.up_codes)[3]
    weights = _weights_of_all(builder, mixture, count)
    up = _matrices(builder, mixture.up_codes, mixture.up_scales, mixture.up_zeros, gate.rows)
    down = _matrices(builder, mixture.down_codes, mixture.down_scales, mixture.down_zeros, None)
    up_bias = _rows_of(builder, mixture.up_bias, gate.rows)
    attributes: dict[str, Any] = {
        "k": axis_size(mixture.chosen, -1),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": gate.alpha,
        "activation_beta": gate.beta,
        "expert_weight_bits": 4,
        "block_size": block,
        "normalize_routing_weights": 0,
        "accuracy_level": 1,  # as of MatMulNBits: no value is rounded to 8 bits
        # The CUDA provider would read the integers in the order of its own kernels otherwise.
        "weights_prepacked": 0,
    }
    if gate.limit is not None:
        attributes["swiglu_limit"] = gate.limit
    up_codes, up_scales, up_zeros = up
    down_codes, down_scales, down_zeros = down
    output = builder.op(
        EXPERTS,
        [
            *(mixture.x, weights),
            *(up_codes, up_scales, up_bias),
            *(down_codes, down_scales, mixture.down_bias),
            *(None, None, None),
            *(up_zeros, down_zeros, None),
            weights,
        ],
        attributes,
        like=mixture.x,
        shape=names_of(mixture.y),
        domain=CONTRIB,
    )
    substitute(node.outputs[0], output)
    return True


def remove_marks(model: ir.Model) -> None:
    """Replace every mark by the output of its mixture.

    Args:
        model: Changed in place. Nodes and constants that nothing reads afterwards are removed, too.
    """
    marks = nodes_of(model, MARK, domain=MARK_DOMAIN)
    for node in marks:
        substitute(node.outputs[0], marked_mixture(node).y)
    if marks:
        remove_dead(model)


def _objection(mixture: Mixture, gate: _Gate) -> str:
    """Return the reason why ``QMoE`` cannot compute a mixture, or ""."""
    constants = [value for value in mixture[6:] if value is not None]
    if any(value.const_value is None or value.is_graph_input() for value in constants):
        return "its matrices are not constant"
    if any(len(_readers(value)) > 1 for value in constants):
        return "other layers have the same matrices"
    dtypes = {v.dtype for v in (mixture.x, mixture.y, mixture.up_scales, mixture.down_scales)}
    dtypes |= {value.dtype for value in (mixture.up_bias, mixture.down_bias) if value is not None}
    if len(dtypes) > 1:
        return "its scales have another dtype than its tokens"
    _, rows, up_blocks, half = _sizes(mixture.up_codes)
    _, hidden, down_blocks, down_half = _sizes(mixture.down_codes)
    if half != down_half:
        return "its matrices have blocks of different sizes"
    if rows != gate.rows.size or (hidden, rows // 2) != (
        2 * half * up_blocks,
        2 * half * down_blocks,
    ):
        return "its sizes are no multiples of the block size"
    if min(up_blocks, down_blocks) < 2:
        return "a row is a single block"
    if not isinstance(axis_size(mixture.chosen, -1), int):
        return "the number of experts of a token is not constant"
    if not _is_non_negative(mixture.weights):
        return "its weights may be negative"
    return ""


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _readers(value: ir.Value) -> list[ir.Node]:
    return [node for node in consumers(value) if (node.domain, node.op_type) == (MARK_DOMAIN, MARK)]


# --- the gate -------------------------------------------------------------------------------------


def _read_gate(before: ir.Value, after: ir.Value) -> _Gate | None:
    """Return the gate that computes ``after`` from ``before``, or None if other nodes compute ``after``."""
    product = made_by(after, "Mul")
    for gated, linear in _orders(product):
        swish = made_by(gated, "Mul")
        for clipped, sigmoid in _orders(swish):
            inner = made_by(sigmoid, "Sigmoid")
            alpha = None if inner is None else _factor(inner.inputs[0], clipped)
            if alpha is None:
                continue
            beta, shifted = _summand(linear)
            half, lower, upper = _clip(clipped)
            other, least, most = _clip(shifted)
            limits = {upper, most, None if least is None else -least}
            if lower is not None or len(limits) > 1:
                continue
            first, second = _rows(before, half), _rows(before, other)
            if first is None or second is None or first.size != second.size:
                continue
            return _Gate(np.stack((first, second), 1).reshape(-1), alpha, beta, upper)
    return None


def _orders(node: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """Return the two operands of a node in both orders, to match a sum or a product."""
    if node is None or len(node.inputs) != 2:
        return []
    first, second = node.inputs
    return [] if first is None or second is None else [(first, second), (second, first)]


def _factor(value: ir.Value | None, base: ir.Value) -> float | None:
    """Return the number c if a value is ``c · base``, otherwise None."""
    if value is base:
        return 1.0
    for operand, factor in _orders(made_by(value, "Mul")):
        if operand is base:
            return scalar(factor)
    return None


def _summand(value: ir.Value) -> tuple[float, ir.Value]:
    """Split a value into a constant summand and the rest."""
    for operand, summand in _orders(made_by(value, "Add")):
        if (number := scalar(summand)) is not None:
            return number, operand
    return 0.0, value


def _clip(value: ir.Value) -> tuple[ir.Value | None, float | None, float | None]:
    """Return the input of a ``Clip`` and its limits, or the value itself and no limits."""
    node = made_by(value, "Clip")
    if node is None:
        return value, None, None
    x, lower, upper = (*node.inputs, None, None)[:3]
    if any(bound is not None and scalar(bound) is None for bound in (lower, upper)):
        return None, None, None
    return x, scalar(lower), scalar(upper)


def _rows(before: ir.Value, half: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the indices of the channels of ``before`` in the slice ``half``, or None if it is no slice."""
    width = axis_size(before, -1)
    node = made_by(half, "Split", "Slice")
    if node is None or node.inputs[0] is not before or not isinstance(width, int):
        return None
    channels = np.arange(width)
    if node.op_type == "Split":
        if node.attributes.get_int("axis", 0) not in (1, -1) or len(node.outputs) != 2:
            return None
        first = sizes(node.inputs[1]) if len(node.inputs) > 1 else (width // 2, width // 2)
        if first != (width // 2, width // 2):
            return None
        part: np.ndarray[Any, Any] = channels.reshape(2, -1)[node.outputs.index(half)]
        return part
    bounds = [sizes(value) for value in node.inputs[1:]]
    if len(bounds) != 4 or any(b is None or len(b) != 1 for b in bounds):
        return None
    start, end, axis, step = (b[0] for b in bounds if b is not None)
    if axis not in (1, -1) or not all(isinstance(number, int) for number in (start, end, step)):
        return None
    return channels[slice(start, end, step)]


# --- the weights of the experts --------------------------------------------------------------------


_NEVER_NEGATIVE = {"Softmax", "Sigmoid", "Relu", "Exp", "Abs", "Sqrt"}
_OF_THE_FIRST_INPUT = {
    *("Cast", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice"),
    *("Split", "Squeeze", "TopK", "Transpose", "Unsqueeze", "ReduceSum", "ReduceMax", "ReduceMean"),
}
_OF_ALL_INPUTS = {"Add", "Concat", "Div", "Max", "Min", "Mul"}


def _is_non_negative(value: ir.Value | None) -> bool:
    """Return True if the operators that compute a value show that no element is negative."""
    array = array_of(value)
    if array is not None:
        return bool((array >= 0).all())
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in _OF_ALL_INPUTS:
        return all(_is_non_negative(operand) for operand in node.inputs)
    if node.op_type in _OF_THE_FIRST_INPUT:
        return _is_non_negative(node.inputs[0])
    return node.op_type in _NEVER_NEGATIVE


def _weights_of_all(builder: Builder, mixture: Mixture, count: int) -> ir.Value:
    """Return the weights of all experts, [T, E]: zero for those that a token did not choose."""
    import onnx_ir as ir

    # In fp32, because the CPU provider has no ScatterElements with a sum in fp16.
    weights = _cast(builder, mixture.weights, ir.DataType.FLOAT)
    tokens = builder.op("Shape", [mixture.chosen], {"start": 0, "end": 1}, shape=[1])
    shape = builder.op("Concat", [tokens, builder.ints([count])], {"axis": 0}, like=tokens)
    axes = [axis_size(mixture.chosen, 0), count]
    zeros = builder.op("Expand", [builder.number(0.0, weights), shape], like=weights, shape=axes)
    options = {"axis": 1, "reduction": "add"}
    inputs = [zeros, mixture.chosen, weights]
    summed = builder.op("ScatterElements", inputs, options, like=weights, shape=axes)
    return _cast(builder, summed, mixture.x.dtype)


def _cast(builder: Builder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.dtype == dtype:
        return value
    return builder.op("Cast", [value], {"to": int(dtype)}, shape=names_of(value))


# --- the matrices ----------------------------------------------------------------------------------


def _matrices(
    builder: Builder,
    codes: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    rows: np.ndarray[Any, Any] | None,
) -> tuple[ir.Value | None, ...]:
    """Return the constants for ``QMoE``, with ``rows`` as the order of output features.

    They are codes [E, out, in / 2], scales [E, out, in / b] and zero points [E, out, ⌈in / 2b⌉].
    """
    count, width, blocks, half = _sizes(codes)
    columns = (blocks * half, blocks, (blocks + 1) // 2)
    return tuple(
        _rows_of(builder, value, rows, [count, width, size])
        for value, size in zip((codes, scales, zeros), columns, strict=True)
    )


def _rows_of(
    builder: Builder,
    value: ir.Value | None,
    rows: np.ndarray[Any, Any] | None,
    shape: list[int] | None = None,
) -> ir.Value | None:
    """Reshape a constant, and order its second axis by ``rows``. The new constant gets the old name."""
    if value is None:
        return None
    tensor: Any = value.const_value
    shape = list(tensor.shape.numpy()) if shape is None else shape
    in_order = rows is None or np.array_equal(rows, np.arange(rows.size))

    def values() -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = tensor.numpy().reshape(shape)
        return array if in_order else array[:, rows]

    name, value.name = str(value.name), f"{value.name}.grouped"
    return builder.later(name, values, shape, tensor.dtype)
