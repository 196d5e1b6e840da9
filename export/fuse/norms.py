"""Normalization by the root mean square: ``x / sqrt(mean(x²) + eps) · gain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    Builder,
    array_of,
    axis_size,
    consumers,
    made_by,
    nodes_of,
    only_user,
    rank,
    scalar,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RmsNorm", "divide_by_root", "find_norms"]


@dataclass(frozen=True)
class RmsNorm:
    """One normalization over the last axis.

    Attributes:
        x: What is normalized, in the dtype that the layer takes.
        gain: What the result is multiplied by, one number a channel.
        epsilon: What is added to the mean of the squares, under the root.
        output: The result.
        last: The node that computes it.
    """

    x: ir.Value
    gain: ir.Value
    epsilon: float
    output: ir.Value
    last: ir.Node


@dataclass(frozen=True)
class _Quotient:
    """``x`` over its root mean square, without the gain: as a product or as a quotient."""

    x: ir.Value
    root: ir.Value
    epsilon: float
    node: ir.Node


def divide_by_root(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Write ``x · (1 / root)`` as ``x / root``, which is the form that ONNX Runtime fuses.

    Args:
        model: Changed in place.

    Returns:
        How many were rewritten, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Mul"):
        found = _quotient(node)
        if found is None:
            continue
        builder = Builder(model, node)
        made = builder.op("Div", [found.x, found.root], like=node.outputs[0])
        substitute(node.outputs[0], made)
        done += 1
    return done, {}


def find_norms(model: ir.Model) -> list[RmsNorm]:
    """Every normalization with a gain over the last axis."""
    found = []
    for node in nodes_of(model, "Mul", "Div"):
        quotient = _quotient(node)
        if quotient is not None and (norm := _with_gain(quotient)) is not None:
            found.append(norm)
    return found


def _quotient(node: ir.Node) -> _Quotient | None:
    """Read ``Mul(x, Reciprocal(root))`` or ``Div(x, root)``, the root being that of the mean square of x."""
    if node.op_type == "Div":
        return _over_root(node, node.inputs[0], node.inputs[1])
    for x, other in (node.inputs, tuple(reversed(node.inputs))):
        inverse = made_by(other, "Reciprocal")
        if inverse is not None and (found := _over_root(node, x, inverse.inputs[0])) is not None:
            return found
    return None


def _over_root(node: ir.Node, x: ir.Value | None, root: ir.Value | None) -> _Quotient | None:
    taken = made_by(root, "Sqrt")
    added = None if taken is None else made_by(taken.inputs[0], "Add")
    if added is None or x is None or root is None:
        return None
    for mean, constant in (added.inputs, tuple(reversed(added.inputs))):
        epsilon = scalar(constant)
        if epsilon is not None and _is_mean_square(mean, x):
            return _Quotient(x, root, epsilon, node)
    return None


def _is_mean_square(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether it is the mean of x² over the last axis, which stays with size 1."""
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
    """The whole layer: x may be widened before, and the quotient narrowed before or after the gain."""
    value = quotient.node.outputs[0]
    if (narrowed := only_user(value, "Cast")) is not None:
        value = narrowed.outputs[0]
    product = only_user(value, "Mul")
    if product is None:
        return None
    gain = next((one for one in product.inputs if one is not value), None)
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


def read_once_more(norm: RmsNorm) -> bool:
    """Whether something else reads what is normalized, as a residual stream does."""
    return len(consumers(norm.x)) > 1
