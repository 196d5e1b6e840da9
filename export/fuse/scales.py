"""Constant scales of low-rank branches, folded into their second factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_fx.export.fuse.graph import (
    Builder,
    array_of,
    axis_size,
    made_by,
    nodes_of,
    only_user,
    rank,
    scalar,
    substitute,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fold_scales"]


def fold_scales(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Write ``s · ((x·A)·B)`` as ``(x·A)·(s·B)``, B being constant.

    Args:
        model: Changed in place.

    Returns:
        How many scales were folded, and nothing else to say.
    """
    done = 0
    for node in nodes_of(model, "MatMul"):
        inner, factor = node.inputs
        scaled = only_user(node.outputs[0], "Mul")
        if scaled is None or factor is None or not _is_low_rank(inner, factor):
            continue
        number = next((scalar(one) for one in scaled.inputs if one is not node.outputs[0]), None)
        if number is None:
            continue
        builder = Builder(model, node)
        made = builder.op(
            "MatMul",
            [inner, _times(builder, factor, number)],
            like=node.outputs[0],
            shape=scaled.outputs[0].shape,
        )
        substitute(scaled.outputs[0], made)
        done += 1
    return done, {}


def _is_low_rank(inner: ir.Value | None, factor: ir.Value) -> bool:
    """Whether it is the second of two products, the rank between them being the smallest size."""
    first = made_by(inner, "MatMul")
    if first is None or rank(factor) != 2 or len(factor.uses()) != 1 or array_of(factor) is None:
        return False
    low, wide, source = axis_size(factor, 0), axis_size(factor, 1), axis_size(first.inputs[0], -1)
    if not isinstance(low, int) or not isinstance(wide, int) or not isinstance(source, int):
        return False
    return low < min(wide, source)


def _times(builder: Builder, factor: ir.Value, number: float) -> ir.Value:
    tensor = factor.const_value
    assert tensor is not None

    def values() -> np.ndarray[Any, Any]:
        array = tensor.numpy()
        made: np.ndarray[Any, Any] = (array.astype(np.float64) * number).astype(array.dtype)
        return made

    name, factor.name = str(factor.name), f"{factor.name}.unscaled"
    return builder.later(name, values, list(tensor.shape.numpy()), tensor.dtype)
