"""Detection and rewriting of attention, ``softmax(scale · q kᵀ + mask) v``, and of its masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.export.fuse.graph import (
    Builder,
    Size,
    array_of,
    at_each,
    axis_size,
    factors_of,
    made_by,
    names_of,
    nodes_of,
    only_user,
    rank,
    scalar,
    sizes,
    substitute,
    sum_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Attention",
    "Mask",
    "bias_of",
    "drop_nan_guards",
    "find_attention",
    "group_heads",
    "mask_rows_once",
    "read_mask",
    "read_range",
]

# --- masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """An additive mask of scores: 0 if every condition holds for a key, otherwise a low number.

    Attributes:
        low: The low number.
        causal: True if a key that comes after the query is masked.
        conditions: The other conditions. All of them hold for a key that is not masked.
    """

    low: ir.Value
    causal: bool
    conditions: tuple[ir.Value, ...]


def read_mask(mask: ir.Value | None, past: Size | None, total: Size | None) -> Mask | None:
    """Read a mask as ``where(a and b and …, 0, low)``, or return None for any other mask.

    Args:
        mask: The value added to the scores.
        past: Number of keys from the cache.
        total: Number of all keys.
    """
    while (node := made_by(mask, "Expand", "Unsqueeze")) is not None:
        mask = node.inputs[0]
    where = made_by(mask, "Where")
    if where is None or scalar(where.inputs[1]) != 0:
        return None
    number = scalar(where.inputs[2])
    low = where.inputs[2]
    if number is None or low is None or number > -1e4:
        return None
    conditions = list(_conjuncts(where.inputs[0]))
    causal = [condition for condition in conditions if _is_causal(condition, past, total)]
    remaining = tuple(
        dict.fromkeys(condition for condition in conditions if condition not in causal)
    )
    return Mask(low, bool(causal), remaining)


def _conjuncts(value: ir.Value | None) -> list[ir.Value]:
    """Split a condition at its ``And`` nodes. Conditions that always hold are left out."""
    node = made_by(value, "And", "Expand", "Identity")
    if value is None:
        return []
    if node is None:
        array = array_of(value)
        return [] if array is not None and bool(array.all()) else [value]
    if node.op_type == "And":
        return [*_conjuncts(node.inputs[0]), *_conjuncts(node.inputs[1])]
    return _conjuncts(node.inputs[0])


def _is_causal(value: ir.Value, past: Size | None, total: Size | None) -> bool:
    """Return True if a condition is ``key position <= query position``."""
    node = made_by(value, "LessOrEqual", "GreaterOrEqual")
    if node is None or past is None or total is None:
        return False
    keys, queries = node.inputs if node.op_type == "LessOrEqual" else reversed(node.inputs)
    # Keys lie along the last axis, queries along the axis before it.
    if names_of(keys)[-2:] != (1, total) or names_of(queries)[-1:] != (1,):
        return False
    return read_range(keys) == (0, total) and read_range(queries) == (past, total)


def read_range(value: ir.Value | None) -> tuple[Size, Size] | None:
    """Return start and end of a value like ``arange(start, end)``, or None for any other value."""
    while (node := made_by(value, "Unsqueeze", "Reshape", "Range", "Add", "Cast")) is not None:
        if node.op_type == "Range":
            start, end = sizes(node.inputs[0]), sizes(node.inputs[1])
            if scalar(node.inputs[2]) != 1 or start is None or end is None:
                return None
            first, last = start[0], end[0]
            return None if first is None or last is None else (first, last)
        if node.op_type == "Add":
            for left, right in (node.inputs, tuple(reversed(node.inputs))):
                numbers, offset = read_range(left), sizes(right)
                if numbers is not None and offset is not None and len(offset) == 1:
                    if offset[0] is None:
                        return None
                    return sum_of(numbers[0], offset[0]), sum_of(numbers[1], offset[0])
            return None
        value = node.inputs[0]
    return None


def bias_of(builder: Builder, mask: Mask, like: ir.Value, sequence: ir.Value) -> ir.Value | None:
    """Build a mask without its causal condition, for every query. Return None if no condition is left.

    Args:
        builder: Builder for the new nodes.
        mask: The mask.
        like: A value with the dtype of the result.
        sequence: The number of queries, as a vector of one element.
    """
    if not mask.conditions:
        return None
    condition, zero = mask.conditions[0], builder.number(0.0, like)
    for other in mask.conditions[1:]:
        condition = builder.op("And", [condition, other])
    padding = _padding(condition)
    if padding is None:
        bias = builder.op("Where", [condition, zero, mask.low], like=like)
    else:  # the position ids compute the same Equal, which is then shared
        source, shape = padding
        masked = builder.op("Equal", [source, builder.number(0, source)])
        masked = builder.op("Reshape", [masked, shape], like=masked)
        bias = builder.op("Where", [masked, mask.low, zero], like=like)
    if len(mask.conditions) == 1 and names_of(condition)[2:3] != (1,):
        return bias
    ones = builder.ints([1, 1])
    shape = builder.op("Concat", [ones, sequence, builder.ints([1])], {"axis": 0})
    return builder.op("Expand", [bias, shape], like=like)


def _padding(condition: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return integers ``x`` and the shape if a condition is ``reshape(x != 0, shape)``, otherwise None."""
    node = made_by(condition, "Reshape")
    cast = None if node is None else made_by(node.inputs[0], "Cast")
    if node is None or cast is None or cast.inputs[0] is None or node.inputs[1] is None:
        return None
    source = cast.inputs[0]
    whole = source.dtype is not None and source.dtype.name in ("INT64", "INT32")
    return (source, node.inputs[1]) if whole else None


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Nodes and values of one attention in a graph, over four axes.

    Attributes:
        query: [batch, heads, sequence, width], before it is scaled.
        key: [batch, groups, length, width], before it is scaled and repeated for the heads of a group.
        value: [batch, groups, length, width of values].
        mask: The value added to the scores, or None.
        scale: The factor of the scores.
        heads: Number of heads of the query.
        groups: Number of heads of key and value.
        softmax: The softmax node.
        guard: The ``Where`` that replaces NaN by 0, or None.
        product: The product of probabilities and values.
        output: [batch, heads, sequence, width of values].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    heads: int
    groups: int
    softmax: ir.Node
    guard: ir.Node | None
    product: ir.Node
    output: ir.Value


def find_attention(model: ir.Model) -> list[Attention]:
    """Find every attention of a model, in order."""
    candidates = (_attention(node) for node in nodes_of(model, "Softmax"))
    return [attention for attention in candidates if attention is not None]


def _attention(softmax: ir.Node) -> Attention | None:
    scores = softmax.inputs[0]
    if scores is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    mask: ir.Value | None = None
    added = made_by(scores, "Add")
    if added is not None:
        pairs = (tuple(added.inputs), tuple(reversed(added.inputs)))
        sides = [(a, b) for a, b in pairs if made_by(factors_of(a)[0], "MatMul")]
        if len(sides) != 1:
            return None
        scores, mask = sides[0]
    product, scale = factors_of(scores)
    matmul = made_by(product, "MatMul")
    probabilities, guard = softmax.outputs[0], None
    if (guarded := _nan_guard(softmax)) is not None:
        probabilities, guard = guarded.outputs[0], guarded
    last = only_user(probabilities, "MatMul")
    if matmul is None or last is None or last.inputs[0] is not probabilities:
        return None
    query, factor = factors_of(matmul.inputs[0])
    scale *= factor
    key, value = last.inputs[1], last.inputs[1]
    key, factor = factors_of(matmul.inputs[1])
    scale *= factor
    key = _swapped(key)
    if key is None or query is None or value is None or rank(query) != 4:
        return None
    key, factor = factors_of(key)
    scale *= factor
    heads = axis_size(query, 1)
    if key is None or not isinstance(heads, int) or query.dtype != key.dtype:
        return None
    key, value = _before_repeat(key), _before_repeat(value)
    groups = axis_size(key, 1)
    if rank(key) != 4 or rank(value) != 4 or axis_size(value, 1) != groups:
        return None
    if not isinstance(groups, int) or heads % groups:
        return None
    if mask is not None and mask.dtype != query.dtype:
        return None
    return Attention(
        query, key, value, mask, scale, heads, groups, softmax, guard, last, last.outputs[0]
    )


def _nan_guard(softmax: ir.Node) -> ir.Node | None:
    """Return the ``Where(IsNaN(p), 0, p)`` after a softmax if nothing else reads the probabilities."""
    value = softmax.outputs[0]
    readers = {node for node, _ in value.uses()}
    checks = [node for node in readers if node.op_type == "IsNaN"]
    if len(readers) != 2 or len(checks) != 1 or value.is_graph_output():
        return None
    where = only_user(checks[0].outputs[0], "Where")
    if where is None or where not in readers or where.inputs[0] is not checks[0].outputs[0]:
        return None
    return where if scalar(where.inputs[1]) == 0 and where.inputs[2] is value else None


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """Return the value before a transpose of its last two axes, or None if there is no such transpose."""
    node = made_by(value, "Transpose")
    if node is not None:
        perm = list(node.attributes.get_ints("perm", ()))
        return node.inputs[0] if perm == [0, 1, 3, 2] else None
    # torch.onnx flattens the leading axes, swaps the last two of three, and unflattens the first again.
    outer = made_by(value, "Reshape")
    turned = None if outer is None else made_by(outer.inputs[0], "Transpose")
    inner = None if turned is None else made_by(turned.inputs[0], "Reshape")
    if outer is None or turned is None or inner is None:
        return None
    source = inner.inputs[0]
    whole = names_of(source)
    flat, shape = sizes(inner.inputs[1]), sizes(outer.inputs[1])
    if list(turned.attributes.get_ints("perm", ())) != [0, 2, 1] or len(whole) != 4:
        return None
    if flat is None or shape is None or None in whole or len(flat) != 3 or len(shape) != 4:
        return None
    if flat[1:] != whole[2:] or shape[2:] != (whole[3], whole[2]):
        return None
    return source if shape[1] == whole[1] else None


def _before_repeat(value: ir.Value) -> ir.Value:
    """Return keys or values before they are repeated for the heads of each group, or the value itself.

    The repeat is [b, g, t, d] → [b, g, n, t, d] → [b, g·n, t, d].
    """
    joined = made_by(value, "Reshape")
    wide = None if joined is None else made_by(joined.inputs[0], "Expand")
    parted = None if wide is None else made_by(wide.inputs[0], "Unsqueeze", "Reshape")
    if joined is None or wide is None or parted is None or parted.inputs[0] is None:
        return value
    source, expanded = names_of(parted.inputs[0]), names_of(wide.outputs[0])
    target = names_of(value)
    if len(source) != 4 or len(expanded) != 5 or len(target) != 4 or None in source:
        return value
    batch, groups, length, width = source
    repeated = expanded[2]
    if names_of(parted.outputs[0]) != (batch, groups, 1, length, width):
        return value
    if expanded != (batch, groups, repeated, length, width) or not isinstance(repeated, int):
        return value
    if not isinstance(groups, int) or target != (batch, groups * repeated, length, width):
        return value
    return parted.inputs[0]


# Dtypes whose lowest number plus a score may be -inf. In fp32 and bf16 the spacing of numbers at the
# lowest number is larger than any score, so the sum stays finite. In fp16 it is not.
_HALVED = {"FLOAT16"}


@at_each(find_attention)
def drop_nan_guards(model: ir.Model, attention: Attention) -> bool | str:
    """Remove the guard against NaN if no row of scores can be masked completely.

    A row of probabilities is NaN only if all its scores are -inf. This cannot happen without a mask, or
    with a mask of finite values.
    """
    if attention.guard is None:
        return False
    if attention.mask is not None and not _is_finite(attention.mask):
        return "its mask may hold -inf in a whole row"
    if attention.mask is not None:
        _halve_lowest(model, attention.mask)
    substitute(attention.guard.outputs[0], attention.softmax.outputs[0])
    return True


def mask_rows_once(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Replace the NaN guard over all probabilities by a mask of rows, which is applied to the output.

    A row whose mask is -inf everywhere gives 0, as in PyTorch. The mask of rows is computed once for
    all layers that share a mask.

    Args:
        model: Changed in place.

    Returns:
        The number of replaced guards, and an empty dict of reasons.
    """
    done = 0
    dead: dict[ir.Value, ir.Value] = {}
    for attention in find_attention(model):
        if attention.guard is None or attention.mask is None or attention.output.is_graph_output():
            continue
        builder = Builder(model, attention.softmax)
        if attention.mask not in dead:
            lowest = builder.number(-np.inf, attention.mask)
            highest = builder.op(
                "ReduceMax", [attention.mask, builder.ints([-1])], like=attention.mask
            )
            dead[attention.mask] = builder.op("Equal", [highest, lowest])
        substitute(attention.guard.outputs[0], attention.softmax.outputs[0])
        after = list(attention.output.uses())
        builder = _behind(model, attention.product)
        zero = builder.number(0.0, attention.output)
        clean = builder.op(
            "Where", [dead[attention.mask], zero, attention.output], like=attention.output
        )
        clean.shape = attention.output.shape
        for node, index in after:
            node.replace_input_with(index, clean)
        done += 1
    return done, {}


def _behind(model: ir.Model, node: ir.Node) -> Builder:
    graph = node.graph
    assert graph is not None
    following = list(graph)
    return Builder(model, following[following.index(node) + 1])


def _is_finite(mask: ir.Value) -> bool:
    """Return True if every value of a mask is finite, and stays finite with a score added.

    In fp16 the lowest number does not. :func:`_halve_lowest` replaces that number in a ``Where``.
    """
    mask = _before_views(mask)
    array = array_of(mask)
    if array is not None:
        return bool(np.isfinite(array).all()) and not _is_half(mask)
    choice = made_by(mask, "Where")
    numbers = [] if choice is None else [scalar(value) for value in choice.inputs[1:]]
    return bool(numbers) and all(number is not None and np.isfinite(number) for number in numbers)


def _halve_lowest(model: ir.Model, mask: ir.Value) -> None:
    """Raise the numbers in the ``Where`` of a fp16 mask to half the lowest number, if they are lower."""
    mask = _before_views(mask)
    choice = made_by(mask, "Where")
    if choice is None or not _is_half(mask):
        return
    for index in (1, 2):
        number = scalar(choice.inputs[index])
        if number is not None and number < _HALF_LOWEST:
            low = Builder(model, choice).number(_HALF_LOWEST, mask)
            choice.replace_input_with(index, low)


def _before_views(value: ir.Value) -> ir.Value:
    """Return the value behind reshapes, expansions and casts that keep the dtype."""
    while (node := made_by(value, "Expand", "Unsqueeze", "Reshape", "Cast")) is not None:
        source = node.inputs[0]
        if source is None or source.dtype != value.dtype:
            break
        value = source
    return value


_HALF_LOWEST = -32752.0  # half the lowest number of fp16: a score as low can be added


def _is_half(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name in _HALVED


@at_each(find_attention)
def group_heads(model: ir.Model, attention: Attention) -> bool:
    """Compute attention over keys and values as they are cached: not repeated, not scaled.

    The heads of a group are rows of one product, ``[b, g, n·s, d] · [b, g, d, t]``. So keys and values
    are not copied for each head. Only the query is scaled.
    """
    builder = Builder(model, attention.softmax)
    dtype = attention.query
    query = attention.query
    if attention.scale != 1.0:
        query = builder.op(
            "Mul", [query, builder.number(attention.scale, query)], like=dtype, shape=query.shape
        )
    batch, _, length, width = names_of(attention.key)
    sequence, out = axis_size(query, 2), axis_size(attention.value, 3)
    apart = [batch, attention.groups, None, width]
    together = (batch, attention.heads, sequence, length)
    grouped = attention.heads != attention.groups
    fold, unfold = (
        builder.ints([0, attention.groups, -1, 0]),
        builder.ints([0, attention.heads, -1, 0]),
    )
    if grouped:
        query = builder.op("Reshape", [query, fold], like=dtype, shape=apart)
    turned = builder.op(
        "Transpose",
        [attention.key],
        {"perm": [0, 1, 3, 2]},
        like=dtype,
        shape=(batch, attention.groups, width, length),
    )
    scores = builder.op("MatMul", [query, turned], like=dtype)
    if grouped:
        scores.shape = _shape((batch, attention.groups, None, length))
        scores = builder.op("Reshape", [scores, unfold], like=dtype)
    scores.shape = _shape(together)
    if attention.mask is not None:
        scores = builder.op("Add", [scores, attention.mask], like=dtype, shape=together)
    attention.softmax.replace_input_with(0, scores)
    attention.softmax.outputs[0].shape = _shape(together)
    last = Builder(model, attention.product)
    weights = attention.product.inputs[0]
    assert weights is not None
    if grouped:
        weights = last.op("Reshape", [weights, fold], like=dtype)
        weights.shape = _shape((batch, attention.groups, None, length))
    output = last.op("MatMul", [weights, attention.value], like=dtype)
    if grouped:
        output.shape = _shape((batch, attention.groups, None, out))
        output = last.op("Reshape", [output, unfold], like=dtype)
    output.shape = attention.output.shape
    substitute(attention.output, output)
    return True


def _shape(axes: tuple[int | str | None, ...]) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape(axes)
