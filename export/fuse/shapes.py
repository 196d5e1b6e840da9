"""Constant shapes of a ``Reshape``, indices that select everything, and the last token cut out early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.fuse.attention import counted
from lora_fx.export.fuse.graph import (
    Builder,
    Size,
    array_of,
    at_nodes,
    axis_size,
    consumers,
    made_by,
    names_of,
    rank,
    remove_dead,
    scalar,
    size_vector,
    sizes,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["drop_moves", "fix_shapes", "index_all", "keep_last_token", "slice_positions"]


@at_nodes("Reshape")
def fix_shapes(model: ir.Model, node: ir.Node) -> bool:
    """Give ``Reshape`` a constant: 0 for an axis that stays, -1 for one that follows from the others."""
    source, wanted = node.inputs
    if array_of(wanted) is not None:
        return False
    shape = _constant_shape(names_of(source), sizes(wanted))
    if shape is None:
        return False
    node.replace_input_with(1, Builder(model, node).ints(shape))
    node.attributes.pop("allowzero", None)
    return True


def _constant_shape(
    have: tuple[Size | None, ...], want: tuple[Size | None, ...] | None
) -> list[int] | None:
    # An axis of size 0 would make -1 ambiguous: only a cache that is still empty has one.
    if want is None or not have or "past_length" in have or 0 in have or 0 in want:
        return None
    shape: list[int] = []
    for place, size in enumerate(want):
        if isinstance(size, int):
            shape.append(size)
        elif size is not None and place < len(have) and have[place] == size:
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None


@at_nodes("GatherND")
def index_all(model: ir.Model, node: ir.Node) -> bool:
    """Replace ``mask[rows, columns]`` over all rows and columns by the mask itself.

    transformers looks each element of a padding mask up by its row and column, which is one ``GatherND``
    with an index for every element.
    """
    data, indices = node.inputs
    joined = made_by(indices, "Concat")
    if data is None or joined is None or len(joined.inputs) != 2:
        return False
    if node.attributes.get_int("batch_dims", 0) or len(names_of(data)) != 2:
        return False
    rows, columns = (_counted(one) for one in joined.inputs)
    target = names_of(node.outputs[0])
    if len(target) != 4 or names_of(data)[0] != target[0] or target[1:3] != (1, 1):
        return False
    batch, _, _, total = target
    if rows != (batch, (batch, 1, 1, 1)) or columns != (total, (1, 1, 1, total)):
        return False
    # Not Unsqueeze: a mask of another length has to fail, as it does now.
    builder = Builder(model, node)
    length = size_vector(model, builder, total)
    if length is None:
        return False
    shape = builder.op("Concat", [builder.ints([0, 1, 1]), length], {"axis": 0})
    made = builder.op("Reshape", [data, shape], like=data, shape=target)
    substitute(node.outputs[0], made)
    return True


def _counted(value: ir.Value | None) -> tuple[Size | None, tuple[Size | None, ...]] | None:
    """The end of the ``Range(0, end)`` that is repeated in a value, and the axes that it had before."""
    node = _range(value)
    found = None if node is None else sizes(node.inputs[1])
    wide = made_by(value, "Unsqueeze")
    wide = None if wide is None else made_by(wide.inputs[0], "Expand")
    if found is None or len(found) != 1 or wide is None:
        return None
    return found[0], names_of(wide.inputs[0])


def _range(value: ir.Value | None) -> ir.Node | None:
    while (node := made_by(value, "Expand", "Unsqueeze", "Range")) is not None:
        if node.op_type == "Range":
            from_zero = scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1
            return node if from_zero else None
        value = node.inputs[0]
    return None


@at_nodes("Gather")
def slice_positions(model: ir.Model, node: ir.Node) -> bool:
    """Replace ``positions[:, [past, …, total - 1]]`` by a slice."""
    data, indices = node.inputs
    found = counted(indices)
    if data is None or found is None or node.attributes.get_int("axis", 0) != 1:
        return False
    builder = Builder(model, node)
    first, last = (size_vector(model, builder, size) for size in found)
    if rank(data) != 2 or first is None or last is None:
        return False
    made = builder.op(
        "Slice", [data, first, last, builder.ints([1])], like=data, shape=node.outputs[0].shape
    )
    substitute(node.outputs[0], made)
    return True


@at_nodes("Reshape", "Transpose")
def drop_moves(model: ir.Model, node: ir.Node) -> bool:
    """Leave out reshapes and transposes that give back what was there."""
    output = node.outputs[0]
    source = _turned_back(node) if node.op_type == "Transpose" else _reshaped_back(node)
    if source is None or output.is_graph_output():
        return False
    substitute(output, source)
    return True


def _turned_back(node: ir.Node) -> ir.Value | None:
    before = made_by(node.inputs[0], "Transpose")
    if before is None:
        return None
    first = list(before.attributes.get_ints("perm", ()))
    second = list(node.attributes.get_ints("perm", ()))
    if not first or [first[axis] for axis in second] != list(range(len(first))):
        return None
    return before.inputs[0]


def _reshaped_back(node: ir.Node) -> ir.Value | None:
    wanted = names_of(node.outputs[0])
    if not wanted or None in wanted:
        return None
    source = node.inputs[0]
    while source is not None:
        if names_of(source) == wanted:
            return source
        before = made_by(source, "Reshape")
        source = None if before is None else before.inputs[0]
    return None


# --- the last token -------------------------------------------------------------------------------


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
        _pass_cut(model, found)
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


def _pass_cut(model: ir.Model, cut: ir.Node) -> None:
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
