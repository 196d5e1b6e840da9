"""Masks of decoders: which of their conditions is the causal one, and what is left without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.export.fuse.graph import (
    Builder,
    Size,
    array_of,
    made_by,
    names_of,
    scalar,
    sizes,
    sum_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Mask", "bias_of", "counted", "read_mask"]


@dataclass(frozen=True)
class Mask:
    """What is added to scores, 0 or a low number by a condition.

    Attributes:
        low: The low number.
        causal: Whether a key that comes after the query is masked.
        others: The other conditions, all of which hold where a key is not masked.
    """

    low: ir.Value
    causal: bool
    others: tuple[ir.Value, ...]


def read_mask(mask: ir.Value | None, past: Size | None, total: Size | None) -> Mask | None:
    """Read a mask as ``where(a and b and …, 0, low)``.

    Args:
        mask: What is added to the scores.
        past: How many keys come from the cache.
        total: How many keys there are.
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
    causal = [one for one in conditions if _is_causal(one, past, total)]
    others = tuple(dict.fromkeys(one for one in conditions if one not in causal))
    return Mask(low, bool(causal), others)


def _conjuncts(value: ir.Value | None) -> list[ir.Value]:
    """The conditions of which a value is the conjunction; those that always hold are left out."""
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
    """Whether a condition is ``key position <= query position``."""
    node = made_by(value, "LessOrEqual", "GreaterOrEqual")
    if node is None or past is None or total is None:
        return False
    keys, queries = node.inputs if node.op_type == "LessOrEqual" else reversed(node.inputs)
    # One is laid out along the last axis, the other along the one before.
    if names_of(keys)[-2:] != (1, total) or names_of(queries)[-1:] != (1,):
        return False
    return counted(keys) == (0, total) and counted(queries) == (past, total)


def counted(value: ir.Value | None) -> tuple[Size, Size] | None:
    """First number, and one more than the last, of numbers that count up by one."""
    while (node := made_by(value, "Unsqueeze", "Reshape", "Range", "Add", "Cast")) is not None:
        if node.op_type == "Range":
            start, end = sizes(node.inputs[0]), sizes(node.inputs[1])
            if scalar(node.inputs[2]) != 1 or start is None or end is None:
                return None
            first, last = start[0], end[0]
            return None if first is None or last is None else (first, last)
        if node.op_type == "Add":
            for one, other in (node.inputs, tuple(reversed(node.inputs))):
                numbers, offset = counted(one), sizes(other)
                if numbers is not None and offset is not None and len(offset) == 1:
                    if offset[0] is None:
                        return None
                    return sum_of(numbers[0], offset[0]), sum_of(numbers[1], offset[0])
            return None
        value = node.inputs[0]
    return None


def bias_of(builder: Builder, mask: Mask, like: ir.Value, sequence: ir.Value) -> ir.Value | None:
    """What is left of a mask without its causal condition, for every query; None for nothing.

    Args:
        builder: Where to.
        mask: The mask.
        like: A value of its dtype.
        sequence: The number of queries, as a vector of one element.
    """
    if not mask.others:
        return None
    condition, zero = mask.others[0], builder.number(0.0, like)
    for other in mask.others[1:]:
        condition = builder.op("And", [condition, other])
    padding = _padding(condition)
    if padding is None:
        made = builder.op("Where", [condition, zero, mask.low], like=like)
    else:  # the positions ask for the same
        source, shape = padding
        masked = builder.op("Equal", [source, builder.number(0, source)])
        masked = builder.op("Reshape", [masked, shape], like=masked)
        made = builder.op("Where", [masked, mask.low, zero], like=like)
    if len(mask.others) == 1 and names_of(condition)[2:3] != (1,):
        return made
    ones = builder.ints([1, 1])
    shape = builder.op("Concat", [ones, sequence, builder.ints([1])], {"axis": 0})
    return builder.op("Expand", [made, shape], like=like)


def _padding(condition: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What is reshaped to which shape, where a condition is ``reshape(x != 0)`` of whole numbers."""
    node = made_by(condition, "Reshape")
    cast = None if node is None else made_by(node.inputs[0], "Cast")
    if node is None or cast is None or cast.inputs[0] is None or node.inputs[1] is None:
        return None
    source = cast.inputs[0]
    whole = source.dtype is not None and source.dtype.name in ("INT64", "INT32")
    return (source, node.inputs[1]) if whole else None
