"""Passes that write norms and activations in forms that a runtime fuses, or as its own operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    array_of,
    at_each,
    at_nodes,
    axis_size,
    factors_of,
    made_by,
    names_of,
    nodes_of,
    only_user,
    rank,
    scalar,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "RmsNorm",
    "bias_gelu",
    "divide_by_root",
    "fast_gelu",
    "find_norms",
    "quick_gelu",
    "skip_layer_norms",
    "skip_norms",
]

# --- norms ----------------------------------------------------------------------------------------
# Normalization by the root mean square: ``x / sqrt(mean(x²) + eps) · gain``.


@dataclass(frozen=True)
class RmsNorm:
    """One normalization over the last axis.

    Attributes:
        x: The input, in the dtype that the layer takes.
        gain: The factor of the result, one number a channel.
        epsilon: The number added to the mean of the squares, under the root.
        output: The result.
        last: The node that computes the result.
    """

    x: ir.Value
    gain: ir.Value
    epsilon: float
    output: ir.Value
    last: ir.Node


@dataclass(frozen=True)
class _Quotient:
    """Quotient of ``x`` and its root mean square, without the gain: a ``Mul`` or a ``Div``."""

    x: ir.Value
    root: ir.Value
    epsilon: float
    node: ir.Node


@at_nodes("Mul")
def divide_by_root(model: ir.Model, node: ir.Node) -> bool:
    """Rewrite ``x · (1 / rms(x))`` as ``x / rms(x)``, the form that ONNX Runtime fuses."""
    quotient = _quotient(node)
    if quotient is None:
        return False
    division = Builder(model, node).op("Div", [quotient.x, quotient.root], like=node.outputs[0])
    substitute(node.outputs[0], division)
    return True


def find_norms(model: ir.Model) -> list[RmsNorm]:
    """Find every RMS normalization over the last axis that has a gain."""
    norms = []
    for node in nodes_of(model, "Mul", "Div"):
        quotient = _quotient(node)
        if quotient is not None and (norm := _with_gain(quotient)) is not None:
            norms.append(norm)
    return norms


def _quotient(node: ir.Node) -> _Quotient | None:
    """Read ``Mul(x, Reciprocal(root))`` or ``Div(x, root)``, if ``root`` is the root mean square of x."""
    if node.op_type == "Div":
        return _over_root(node, node.inputs[0], node.inputs[1])
    for x, other in (node.inputs, tuple(reversed(node.inputs))):
        inverse = made_by(other, "Reciprocal")
        if inverse is not None and (quotient := _over_root(node, x, inverse.inputs[0])) is not None:
            return quotient
    return None


def _over_root(node: ir.Node, x: ir.Value | None, root: ir.Value | None) -> _Quotient | None:
    square_root = made_by(root, "Sqrt")
    added = None if square_root is None else made_by(square_root.inputs[0], "Add")
    if added is None or x is None or root is None:
        return None
    for mean, constant in (added.inputs, tuple(reversed(added.inputs))):
        epsilon = scalar(constant)
        if epsilon is not None and _is_mean_square(mean, x):
            return _Quotient(x, root, epsilon, node)
    return None


def _is_mean_square(value: ir.Value | None, x: ir.Value) -> bool:
    """Return True if a value is the mean of x² over the last axis, with that axis kept."""
    mean = made_by(value, "ReduceMean")
    if mean is None or mean.attributes.get_int("keepdims", 1) != 1 or len(mean.inputs) < 2:
        return False
    axes = array_of(mean.inputs[1])
    count = rank(x)
    if (
        axes is None
        or axes.size != 1
        or count is None
        or int(axes.reshape(-1)[0]) not in (-1, count - 1)
    ):
        return False
    power = made_by(mean.inputs[0], "Pow")
    if power is not None:
        return power.inputs[0] is x and scalar(power.inputs[1]) == 2
    product = made_by(mean.inputs[0], "Mul")
    return product is not None and product.inputs[0] is x and product.inputs[1] is x


def _with_gain(quotient: _Quotient) -> RmsNorm | None:
    """Return the RMS norm that contains a quotient: with its gain and casts. None without a gain."""
    value = quotient.node.outputs[0]
    if (narrowed := only_user(value, "Cast")) is not None:
        value = narrowed.outputs[0]
    product = only_user(value, "Mul")
    if product is None:
        return None
    gain = next((operand for operand in product.inputs if operand is not value), None)
    if gain is None or rank(gain) != 1 or axis_size(gain, 0) != axis_size(quotient.x, -1):
        return None
    output, last, x = product.outputs[0], product, quotient.x
    widened = made_by(x, "Cast")
    if widened is not None and widened.inputs[0] is not None:
        source = widened.inputs[0]
        if output.dtype != source.dtype and (after := only_user(output, "Cast")) is not None:
            output, last = after.outputs[0], after
        if output.dtype == source.dtype:
            x = source
    if output.dtype != x.dtype:
        return None
    return RmsNorm(x, gain, quotient.epsilon, output, last)


@at_each(find_norms)
def skip_norms(model: ir.Model, norm: RmsNorm) -> bool:
    """Fuse an RMS norm with the residual sum in front of it, which other nodes read as well.

    A norm without such a sum becomes a norm of ``x + x`` with four times epsilon. The result is the same to
    the last bit if ``x + x`` is finite. In fp16 it may overflow, so such a norm is not fused. Norms of single
    heads are not fused either, because ONNX Runtime fuses them when it loads a file. ONNX Runtime's operator
    for a norm without a sum is not used: it is in the domain of ONNX, whose checker does not know it.
    """
    assert norm.x.dtype is not None
    added = _residual(norm.x)
    if rank(norm.x) != 3 or (added is None and norm.x.dtype.name == "FLOAT16"):
        return False
    builder, gain, operator = (
        Builder(model, norm.last),
        norm.gain,
        "SkipSimplifiedLayerNormalization",
    )
    if gain.dtype != norm.x.dtype:
        gain = builder.op("Cast", [gain], {"to": int(norm.x.dtype)}, like=norm.x)
    if added is None:
        inputs, epsilon = [norm.x, norm.x, gain], {"epsilon": 4 * norm.epsilon}
        result = builder.op(operator, inputs, epsilon, like=norm.x, domain=CONTRIB)
        substitute(norm.output, result)
    else:
        _add_within(model, norm.last, added, operator, [gain], norm.epsilon, norm.output)
    return True


@at_nodes("LayerNormalization")
def skip_layer_norms(model: ir.Model, node: ir.Node) -> bool:
    """Fuse a layer norm with the residual sum that it reads. The fused operator returns the sum, too."""
    added = _residual(node.inputs[0])
    if added is None or not _is_plain(node):
        return False
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    gains, operator = node.inputs[1:], "SkipLayerNormalization"
    _add_within(model, node, added, operator, gains, epsilon, node.outputs[0])
    return True


def _add_within(
    model: ir.Model,
    last: ir.Node,
    added: ir.Node,
    operator: str,
    gains: Sequence[ir.Value | None],
    epsilon: float,
    output: ir.Value,
) -> None:
    """Replace a sum and its norm, which ends with the node ``last``, by one operator."""
    total = added.outputs[0]
    result = Builder(model, last).op(
        operator,
        [*added.inputs, *gains],
        {"epsilon": epsilon},
        like=total,
        domain=CONTRIB,
        outputs=4,
    )
    producer = result.producer()
    assert producer is not None
    for unread in producer.outputs[1:3]:  # mean and deviation, which nothing reads
        unread.type = None
    substitute(output, result)
    _read_after(total, producer.outputs[3], producer)


def _residual(value: ir.Value | None) -> ir.Node | None:
    """Return the residual sum that computes a value, an ``Add`` of two [batch, sequence, width], or None."""
    added = made_by(value, "Add")
    if added is None or added.outputs[0].is_graph_output():
        return None
    left, right = (names_of(term) for term in added.inputs)
    return added if len(left) == 3 and left == right and None not in left else None


def _is_plain(node: ir.Node) -> bool:
    """Return True if the fused operator can compute a layer norm: last axis, a gain, and an unread mean."""
    last = node.attributes.get_int("axis", -1) in (-1, 2)
    return last and len(node.inputs) > 1 and not any(output.uses() for output in node.outputs[1:])


def _read_after(old: ir.Value, new: ir.Value, node: ir.Node) -> None:
    """Let the nodes after ``node`` read ``new`` instead of ``old``. Earlier nodes still read ``old``."""
    graph = node.graph
    assert graph is not None
    new.shape = old.shape
    behind = set(list(graph)[list(graph).index(node) :]) - {node}
    for user, index in list(old.uses()):
        if user in behind:
            user.replace_input_with(index, new)


# --- activations ----------------------------------------------------------------------------------
# Activations: ``x · sigmoid(a·x)`` and the two forms of gelu.


@at_nodes("Mul")
def quick_gelu(model: ir.Model, node: ir.Node) -> bool:
    """Replace ``x · sigmoid(a·x)`` by one ``QuickGelu``. It is SiLU if a is 1."""
    for x, gate in (node.inputs, tuple(reversed(node.inputs))):
        sigmoid = made_by(gate, "Sigmoid")
        if x is None or sigmoid is None:
            continue
        inner, alpha = factors_of(sigmoid.inputs[0])
        if sigmoid.inputs[0] is x:
            alpha = 1.0
        elif inner is not x:
            continue
        builder = Builder(model, node)
        fused = builder.op("QuickGelu", [x], {"alpha": alpha}, like=x, domain=CONTRIB)
        substitute(node.outputs[0], fused)
        return True
    return False


_CUBIC = 0.044715


@at_nodes("Gelu", "Mul")
def fast_gelu(model: ir.Model, node: ir.Node) -> bool:
    """Replace a tanh gelu by one ``FastGelu``: ``x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))``."""
    x = _tanh_gelu(node)
    if x is None:
        return False
    fused = Builder(model, node).op("FastGelu", [x], like=x, domain=CONTRIB)
    substitute(node.outputs[0], fused)
    return True


def _tanh_gelu(node: ir.Node) -> ir.Value | None:
    """Return the argument of a tanh gelu, given its operator or the last product of its formula."""
    if node.op_type == "Gelu":
        return node.inputs[0] if _approximate(node) == "tanh" else None
    for half, gate in (node.inputs, tuple(reversed(node.inputs))):
        x, factor = factors_of(half)
        plus = made_by(gate, "Add")
        if x is None or plus is None or not math.isclose(factor, 0.5, rel_tol=1e-6):
            continue
        for left, right in (plus.inputs, tuple(reversed(plus.inputs))):
            tanh = made_by(left, "Tanh")
            if tanh is not None and scalar(right) == 1 and _is_argument(tanh.inputs[0], x):
                return x
    return None


def _is_argument(value: ir.Value | None, x: ir.Value) -> bool:
    """Return True if a value is ``√(2/π) · (x + 0.044715 x³)``."""
    inner, factor = factors_of(value)
    added = made_by(inner, "Add")
    if added is None or not math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-3):
        return False
    for left, right in (added.inputs, tuple(reversed(added.inputs))):
        cube, coefficient = factors_of(right)
        power = made_by(cube, "Pow")
        if left is x and power is not None and math.isclose(coefficient, _CUBIC, rel_tol=1e-3):
            return power.inputs[0] is x and scalar(power.inputs[1]) == 3
    return False


def _approximate(gelu: ir.Node) -> str:
    return str(gelu.attributes.get_string("approximate", "none"))


def _find_gelus(model: ir.Model) -> list[ir.Node]:
    exact = [node for node in nodes_of(model, "Gelu") if _approximate(node) == "none"]
    fast = nodes_of(model, "FastGelu", domain=CONTRIB)
    return [*exact, *(node for node in fast if len(node.inputs) == 1)]


@at_each(_find_gelus)
def bias_gelu(model: ir.Model, node: ir.Node) -> bool:
    """Fuse a gelu with the bias in front of it: ``BiasGelu``, or ``FastGelu`` with a second input."""
    added = made_by(node.inputs[0], "Add")
    if added is None or added.outputs[0].is_graph_output() or len(added.outputs[0].uses()) > 1:
        return False
    for x, bias in (added.inputs, tuple(reversed(added.inputs))):
        if x is None or rank(bias) != 1 or rank(x) in (None, 1):
            continue
        if not isinstance(axis_size(bias, 0), int) or axis_size(bias, 0) != axis_size(x, -1):
            continue
        operator = "BiasGelu" if node.op_type == "Gelu" else "FastGelu"
        fused = Builder(model, node).op(operator, [x, bias], like=x, domain=CONTRIB)
        substitute(node.outputs[0], fused)
        return True
    return False
