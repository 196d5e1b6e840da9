"""Shapes that a ``Reshape`` can have as constants, and indices that select everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    Builder,
    Size,
    array_of,
    made_by,
    names_of,
    nodes_of,
    rank,
    scalar,
    size_vector,
    sizes,
    substitute,
)
from lora_fx.export.fuse.masks import counted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["drop_moves", "fix_shapes", "index_all", "slice_positions"]


def fix_shapes(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Give ``Reshape`` a constant: 0 for an axis that stays, -1 for one that follows from the others.

    Args:
        model: Changed in place.

    Returns:
        How many shapes were computed before, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Reshape"):
        source, wanted = node.inputs
        if array_of(wanted) is not None:
            continue
        shape = _constant_shape(names_of(source), sizes(wanted))
        if shape is None:
            continue
        node.replace_input_with(1, Builder(model, node).ints(shape))
        node.attributes.pop("allowzero", None)
        done += 1
    return done, {}


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


def index_all(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Replace ``mask[rows, columns]`` over all rows and columns by the mask itself.

    transformers looks each element of a padding mask up by its row and column, which is one ``GatherND``
    with an index for every element.

    Args:
        model: Changed in place.

    Returns:
        How many were replaced, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "GatherND"):
        data, indices = node.inputs
        joined = made_by(indices, "Concat")
        if data is None or joined is None or len(joined.inputs) != 2:
            continue
        if node.attributes.get_int("batch_dims", 0) or len(names_of(data)) != 2:
            continue
        rows, columns = (_counted(one) for one in joined.inputs)
        target = names_of(node.outputs[0])
        if len(target) != 4 or names_of(data)[0] != target[0] or target[1:3] != (1, 1):
            continue
        batch, _, _, total = target
        if rows != (batch, (batch, 1, 1, 1)) or columns != (total, (1, 1, 1, total)):
            continue
        # Not Unsqueeze: a mask of another length has to fail, as it does now.
        builder = Builder(model, node)
        length = size_vector(model, builder, total)
        if length is None:
            continue
        shape = builder.op("Concat", [builder.ints([0, 1, 1]), length], {"axis": 0})
        made = builder.op("Reshape", [data, shape], like=data, shape=target)
        substitute(node.outputs[0], made)
        done += 1
    return done, {}


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


def slice_positions(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Replace ``positions[:, [past, …, total - 1]]`` by a slice.

    Args:
        model: Changed in place.

    Returns:
        How many were replaced, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Gather"):
        data, indices = node.inputs
        found = counted(indices)
        if data is None or found is None or node.attributes.get_int("axis", 0) != 1:
            continue
        builder = Builder(model, node)
        first, last = (size_vector(model, builder, size) for size in found)
        if rank(data) != 2 or first is None or last is None:
            continue
        made = builder.op(
            "Slice", [data, first, last, builder.ints([1])], like=data, shape=node.outputs[0].shape
        )
        substitute(node.outputs[0], made)
        done += 1
    return done, {}


def drop_moves(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Leave out reshapes and transposes that give back what was there.

    Args:
        model: Changed in place.

    Returns:
        How many were left out, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "Reshape", "Transpose"):
        output = node.outputs[0]
        source = _turned_back(node) if node.op_type == "Transpose" else _reshaped_back(node)
        if source is None or output.is_graph_output():
            continue
        substitute(output, source)
        done += 1
    return done, {}


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
