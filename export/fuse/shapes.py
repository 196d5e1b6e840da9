"""Passes over shapes and indices: constant ``Reshape`` shapes, trivial gathers, early cuts to one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.fuse.attention import read_range
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
    """Give ``Reshape`` a constant shape: 0 for an unchanged axis, -1 for an axis that is inferred."""
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
    # An axis of size 0 would make -1 ambiguous. Only a cache that is still empty has such an axis.
    if want is None or not have or "past_length" in have or 0 in have or 0 in want:
        return None
    shape: list[int] = []
    for axis, size in enumerate(want):
        if isinstance(size, int):
            shape.append(size)
        elif size is not None and axis < len(have) and have[axis] == size:
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None


@at_nodes("GatherND")
def index_all(model: ir.Model, node: ir.Node) -> bool:
    """Replace ``mask[rows, columns]`` over all rows and columns by the mask itself.

    transformers looks up each element of a padding mask by its row and column. In the graph this is a
    ``GatherND`` with an index for every element.
    """
    data, indices = node.inputs
    joined = made_by(indices, "Concat")
    if data is None or joined is None or len(joined.inputs) != 2:
        return False
    if node.attributes.get_int("batch_dims", 0) or len(names_of(data)) != 2:
        return False
    rows, columns = (_read_expanded_range(index) for index in joined.inputs)
    target = names_of(node.outputs[0])
    if len(target) != 4 or names_of(data)[0] != target[0] or target[1:3] != (1, 1):
        return False
    batch, _, _, total = target
    if rows != (batch, (batch, 1, 1, 1)) or columns != (total, (1, 1, 1, total)):
        return False
    # Not Unsqueeze, because a mask of another length must still fail.
    builder = Builder(model, node)
    length = size_vector(model, builder, total)
    if length is None:
        return False
    shape = builder.op("Concat", [builder.ints([0, 1, 1]), length], {"axis": 0})
    mask = builder.op("Reshape", [data, shape], like=data, shape=target)
    substitute(node.outputs[0], mask)
    return True


def _read_expanded_range(
    value: ir.Value | None,
) -> tuple[Size | None, tuple[Size | None, ...]] | None:
    """Read indices as ``expand(range(0, end))``, for :func:`index_all`.

    Returns:
        ``end``, and the shape of the range before the expansion. None for other indices.
    """
    node = _range(value)
    ends = None if node is None else sizes(node.inputs[1])
    wide = made_by(value, "Unsqueeze")
    wide = None if wide is None else made_by(wide.inputs[0], "Expand")
    if ends is None or len(ends) != 1 or wide is None:
        return None
    return ends[0], names_of(wide.inputs[0])


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
    bounds = read_range(indices)
    if data is None or bounds is None or node.attributes.get_int("axis", 0) != 1:
        return False
    builder = Builder(model, node)
    first, last = (size_vector(model, builder, size) for size in bounds)
    if rank(data) != 2 or first is None or last is None:
        return False
    part = builder.op(
        "Slice", [data, first, last, builder.ints([1])], like=data, shape=node.outputs[0].shape
    )
    substitute(node.outputs[0], part)
    return True


@at_nodes("Reshape", "Transpose")
def drop_moves(model: ir.Model, node: ir.Node) -> bool:
    """Remove reshapes and transposes that undo earlier ones."""
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


# Each row of the output of these operators depends only on the same row of the inputs.
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
    """Move slices of the last token in front of operations that compute each token separately.

    ``f(x)[:, -1:]`` becomes ``f(x[:, -1:])`` if nothing else reads ``f(x)``. A decoder then computes the
    last layer's output projection and MLP, and the last norm, for only one token of a prompt.

    Args:
        model: Changed in place.

    Returns:
        The number of operations that now compute one token, and an empty dict of reasons.
    """
    done = 0
    while True:
        cuts = [node for node in model.graph if _is_cut(node)]
        cut = next((node for node in cuts if _can_pass(node)), None)
        if cut is None:
            return done, {}
        _pass_cut(model, cut)
        remove_dead(model)
        done += 1


def _is_cut(node: ir.Node) -> bool:
    """Return True if a node cuts [batch, sequence, width] to the last token: ``x[:, -1:]``."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) < 4 or rank(node.inputs[0]) != 3:
        return False
    start, end, axis = (scalar(bound) for bound in node.inputs[1:4])
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
    return all(
        operand is None or _has_tokens(operand, value) or _is_alike(operand)
        for operand in node.inputs
    )


def _has_tokens(operand: ir.Value, value: ir.Value) -> bool:
    return rank(operand) == 3 and axis_size(operand, 1) == axis_size(value, 1) is not None


def _is_alike(operand: ir.Value) -> bool:
    """Return True if a value is the same for all tokens."""
    count = rank(operand)
    return count is not None and (count < 2 or (count == 3 and axis_size(operand, 1) == 1))


def _pass_cut(model: ir.Model, cut: ir.Node) -> None:
    """Move a cut to the last token from the output of a node to the inputs of the node."""
    value = cut.inputs[0]
    assert value is not None
    node = value.producer()
    assert node is not None
    builder = Builder(model, node)
    inputs = list(node.inputs)
    for index, operand in enumerate(inputs):
        if (
            operand is None
            or not _has_tokens(operand, value)
            or (index and node.op_type in _FIRST_INPUT)
        ):
            continue
        batch, _, width = names_of(operand)
        inputs[index] = builder.op(
            "Slice", [operand, *cut.inputs[1:]], like=operand, shape=(batch, 1, width)
        )
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    batch, _, width = names_of(value)
    token = builder.op(
        node.op_type,
        inputs,
        attributes,
        like=value,
        shape=(batch, 1, width),
        domain=node.domain,
    )
    for user in consumers(value):
        substitute(user.outputs[0], token)
