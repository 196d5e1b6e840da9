"""What is computed of all tokens although the last one alone is read: layers above the last attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    Builder,
    axis_size,
    consumers,
    names_of,
    rank,
    remove_dead,
    scalar,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["keep_last_token"]


# Every row of an output depends on the same row of the inputs.
_ELEMENTWISE = frozenset(
    {
        *(
            "Abs",
            "Add",
            "Cast",
            "Clip",
            "Div",
            "Erf",
            "Exp",
            "Gelu",
            "LeakyRelu",
            "Mul",
            "Neg",
            "Pow",
        ),
        *("Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"),
    }
)
_FIRST_INPUT = frozenset(
    {"MatMul", "MatMulNBits", "MatMulBnb4", "LayerNormalization", "ReduceMean"}
)


def keep_last_token(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Cut the last token out before what is computed for it, not behind.

    ``f(x)[:, -1:]`` becomes ``f(x[:, -1:])`` where f computes each token alone and nothing else reads
    ``f(x)``. In a decoder that leaves the last layer's output projection and MLP, and the last norm, for
    one token of a prompt.

    Args:
        model: Changed in place.

    Returns:
        How many operations compute one token, and nothing else to say.
    """
    done = 0
    while True:
        cuts = [node for node in model.graph if _is_cut(node)]
        found = next((node for node in cuts if _can_pass(node)), None)
        if found is None:
            return done, {}
        _pass(model, found)
        remove_dead(model)
        done += 1


def _is_cut(node: ir.Node) -> bool:
    """Whether a node is ``x[:, -1:]`` of [batch, sequence, width]."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) < 4 or rank(node.inputs[0]) != 3:
        return False
    start, end, axis = (scalar(one) for one in node.inputs[1:4])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1
    return start == -1 and end is not None and end >= 2**31 - 1 and axis == 1 and step == 1


def _can_pass(cut: ir.Node) -> bool:
    value = cut.inputs[0]
    node = None if value is None else value.producer()
    if (
        value is None
        or node is None
        or value.is_graph_output()
        or isinstance(axis_size(value, 1), int)
    ):
        return False
    if len(node.outputs) != 1 or not all(_is_cut(user) for user in consumers(value)):
        return False
    if node.op_type in _FIRST_INPUT:
        first = node.inputs[0]
        if names_of(first)[:2] != names_of(value)[:2] or rank(first) != 3:
            return False
        if node.op_type == "MatMul":
            return rank(node.inputs[1]) in (2, 3)  # one matrix, or one for each row of the batch
        if node.op_type == "ReduceMean":
            return len(node.inputs) > 1 and scalar(node.inputs[1]) in (-1, 2) and rank(value) == 3
        return node.op_type != "LayerNormalization" or node.attributes.get_int("axis", -1) in (
            -1,
            2,
        )
    if node.op_type not in _ELEMENTWISE or node.domain:
        return False
    return all(one is None or _has_tokens(one, value) or _is_alike(one) for one in node.inputs)


def _has_tokens(one: ir.Value, value: ir.Value) -> bool:
    return rank(one) == 3 and axis_size(one, 1) == axis_size(value, 1) is not None


def _is_alike(one: ir.Value) -> bool:
    """Whether a value is the same for all tokens."""
    count = rank(one)
    return count is not None and (count < 2 or (count == 3 and axis_size(one, 1) == 1))


def _pass(model: ir.Model, cut: ir.Node) -> None:
    """Cut the inputs of the node that computes what is cut, and compute it of them."""
    value = cut.inputs[0]
    assert value is not None
    node = value.producer()
    assert node is not None
    builder = Builder(model, node)
    inputs = list(node.inputs)
    for place, one in enumerate(inputs):
        if one is None or not _has_tokens(one, value) or (place and node.op_type in _FIRST_INPUT):
            continue
        batch, _, width = names_of(one)
        inputs[place] = builder.op(
            "Slice", [one, *cut.inputs[1:]], like=one, shape=(batch, 1, width)
        )
    attributes = {name: one.value for name, one in node.attributes.items()}
    batch, _, width = names_of(value)
    made = builder.op(
        node.op_type,
        inputs,
        attributes,
        like=value,
        shape=(batch, 1, width),
        domain=node.domain,
    )
    for user in consumers(value):
        substitute(user.outputs[0], made)
