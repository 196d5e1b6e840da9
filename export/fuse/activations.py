"""Activations: ``x · sigmoid(a·x)`` and the two forms of gelu."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    CONTRIB,
    Builder,
    axis_size,
    factors_of,
    made_by,
    nodes_of,
    rank,
    scalar,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["bias_gelu", "fast_gelu", "quick_gelu"]


def quick_gelu(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Make one ``QuickGelu`` of ``x · sigmoid(a·x)``, which with a = 1 is SiLU.

    Args:
        model: Changed in place.

    Returns:
        How many there were, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Mul"):
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
            made = builder.op("QuickGelu", [x], {"alpha": alpha}, like=x, domain=CONTRIB)
            substitute(node.outputs[0], made)
            done += 1
            break
    return done, {}


_CUBIC = 0.044715


def fast_gelu(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Make one ``FastGelu`` of gelu with tanh: ``x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))``.

    Args:
        model: Changed in place.

    Returns:
        How many there were, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Gelu"):
        approximate = node.attributes.get_string("approximate", "none")
        x = node.inputs[0]
        if approximate == "tanh" and x is not None:
            _as_fast(model, node, x)
            done += 1
    for node in nodes_of(model, "Mul"):
        x = _tanh_gelu(node)
        if x is not None:
            _as_fast(model, node, x)
            done += 1
    return done, {}


def _as_fast(model: ir.Model, node: ir.Node, x: ir.Value) -> None:
    made = Builder(model, node).op("FastGelu", [x], like=x, domain=CONTRIB)
    substitute(node.outputs[0], made)


def _tanh_gelu(node: ir.Node) -> ir.Value | None:
    """The argument of a gelu with tanh, as the product at its end."""
    for half, rest in (node.inputs, tuple(reversed(node.inputs))):
        x, factor = factors_of(half)
        plus = made_by(rest, "Add")
        if x is None or plus is None or not math.isclose(factor, 0.5, rel_tol=1e-6):
            continue
        for one, other in (plus.inputs, tuple(reversed(plus.inputs))):
            tanh = made_by(one, "Tanh")
            if tanh is not None and scalar(other) == 1 and _is_argument(tanh.inputs[0], x):
                return x
    return None


def _is_argument(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether a value is ``√(2/π) · (x + 0.044715 x³)``."""
    inner, factor = factors_of(value)
    added = made_by(inner, "Add")
    if added is None or not math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-3):
        return False
    for one, other in (added.inputs, tuple(reversed(added.inputs))):
        cube, by = factors_of(other)
        power = made_by(cube, "Pow")
        if one is x and power is not None and math.isclose(by, _CUBIC, rel_tol=1e-3):
            return power.inputs[0] is x and scalar(power.inputs[1]) == 3
    return False


def bias_gelu(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Let a gelu add the bias in front of it: ``BiasGelu``, or ``FastGelu`` with its second input.

    Args:
        model: Changed in place. :func:`fast_gelu` has been over it.

    Returns:
        How many there were, and nothing else to say.
    """
    done = 0
    fast = [node for node in model.graph if node.op_type == "FastGelu" and len(node.inputs) == 1]
    exact = [
        node
        for node in nodes_of(model, "Gelu")
        if node.attributes.get_string("approximate", "none") == "none"
    ]
    for node in (*exact, *fast):
        added = made_by(node.inputs[0], "Add")
        if added is None or added.outputs[0].is_graph_output() or len(added.outputs[0].uses()) > 1:
            continue
        for x, bias in (added.inputs, tuple(reversed(added.inputs))):
            if x is None or rank(bias) != 1 or rank(x) in (None, 1):
                continue
            if not isinstance(axis_size(bias, 0), int) or axis_size(bias, 0) != axis_size(x, -1):
                continue
            operator = "BiasGelu" if node.op_type == "Gelu" else "FastGelu"
            made = Builder(model, node).op(operator, [x, bias], like=x, domain=CONTRIB)
            substitute(node.outputs[0], made)
            done += 1
            break
    return done, {}
