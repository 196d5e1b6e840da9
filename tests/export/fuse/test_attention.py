"""Attention in standard operators: the guard against NaN, and keys that are neither repeated nor scaled."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest

from lora_fx.export.fuse.attention import (
    drop_nan_guards,
    find_attention,
    group_heads,
    mask_rows_once,
)
from lora_fx.export.fuse.graph import remove_dead
from tests.export.fuse.small import FLOAT, HALF, fused_equally, graph, operators, run

BOOL = oh.TensorProto.BOOL
LOWEST = float(np.finfo(np.float32).min)


def attention(
    low: float = LOWEST, *, groups: int = 4, swap: bool = True, half: bool = False
) -> ir.Model:
    """softmax(q kᵀ/2 + where(allowed, 0, low)) v, with the guard, for 4 heads of 8 channels."""
    kind, dtype = (HALF, np.float16) if half else (FLOAT, np.float32)
    nodes, key, value = [], "k", "v"
    if groups != 4:
        for name in ("k", "v"):
            nodes += [
                oh.make_node("Unsqueeze", [name, "axis2"], [f"{name}5"]),
                oh.make_node("Concat", ["b", "g", "n", "t", "d"], [f"{name}wide"], axis=0),
                oh.make_node("Expand", [f"{name}5", f"{name}wide"], [f"{name}x"]),
                oh.make_node("Reshape", [f"{name}x", "joined"], [f"{name}all"]),
            ]
        nodes = [
            oh.make_node("Shape", ["k"], ["b"], start=0, end=1),
            oh.make_node("Shape", ["k"], ["t"], start=2, end=3),
            *nodes,
        ]
        key, value = "kall", "vall"
    nodes += [
        oh.make_node("Transpose", [key], ["kt"], perm=[0, 1, 3, 2] if swap else [0, 1, 2, 3]),
        oh.make_node("Mul", ["q", "root"], ["qs"]),
        oh.make_node("Mul", ["kt", "root"], ["ks"]),
        oh.make_node("MatMul", ["qs", "ks"], ["scores"]),
        oh.make_node("Where", ["allowed", "zero", "low"], ["mask"]),
        oh.make_node("Add", ["scores", "mask"], ["masked"]),
        oh.make_node("Softmax", ["masked"], ["p"], axis=-1),
        oh.make_node("IsNaN", ["p"], ["lost"]),
        oh.make_node("Where", ["lost", "zero", "p"], ["safe"]),
        oh.make_node("MatMul", ["safe", value], ["out"]),
        oh.make_node("Identity", ["out"], ["y"]),
    ]
    made = graph(
        nodes,
        {
            "q": (kind, ["batch", 4, "s", 8]),
            "k": (kind, ["batch", groups, "t", 8]),
            "v": (kind, ["batch", groups, "t", 8]),
            "allowed": (BOOL, ["batch", 1, "s", "t"]),
        },
        {"y": (kind, ["batch", 4, "s", 8])},
        {
            "root": dtype(0.5**0.5),
            "zero": dtype(0),
            "low": dtype(low),
            "axis2": np.array([2]),
            "g": np.array([groups]),
            "n": np.array([4 // groups]),
            "d": np.array([8]),
            "joined": np.array([0, 4, -1, 8]),
        },
    )
    if groups != 4:  # as torch.onnx knows the shapes
        for node in made.graph:
            if node.op_type == "Expand":
                node.outputs[0].shape = ir.Shape(["batch", groups, 4 // groups, "t", 8])
            if node.op_type == "Reshape":
                node.outputs[0].shape = ir.Shape(["batch", 4, "t", 8])
    return made


def feeds(*, whole: bool, groups: int = 4, dtype: Any = np.float32) -> dict[str, Any]:
    """Random values; ``whole`` masks one row whole."""
    draw = np.random.default_rng(0)
    q, k, v = (
        draw.normal(size=(2, heads, length, 8)).astype(dtype)
        for heads, length in ((4, 3), (groups, 5), (groups, 5))
    )
    allowed = np.tril(np.ones((3, 5), bool), 2)[None, None].repeat(2, 0)
    if whole:
        allowed[1, 0, 0] = False
    return {"q": q, "k": k, "v": v, "allowed": allowed}


@pytest.mark.parametrize("whole", [False, True])
def test_no_guard_where_the_mask_is_finite(whole: bool) -> None:
    count, made = fused_equally(attention, drop_nan_guards, **feeds(whole=whole))
    assert count == 1
    assert operators(made)["IsNaN"] == 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_finite_mask_in_half_precision_is_halved(whole: bool) -> None:
    # -65504 and a score of -17 are -inf in fp16, and a row of them NaN.
    lowest = float(np.finfo(np.float16).min)
    made = attention(lowest, half=True)
    assert drop_nan_guards(made) == (1, {})
    values = feeds(whole=whole, dtype=np.float16)
    values["q"] = values["q"] * np.float16(40)
    (got,) = run(made, **values)
    assert np.isfinite(got).all()
    lows = [one.const_value.numpy() for one in made.graph.initializers.values()]
    assert any(low.dtype == np.float16 and low == -32752 for low in lows if low.ndim == 0)


def test_the_guard_stays_where_a_whole_row_may_be_masked() -> None:
    made = attention(-np.inf)
    count, why = drop_nan_guards(made)
    assert count == 0
    assert why == {"its mask may hold -inf in a whole row": 1}
    assert operators(made)["IsNaN"] == 1


@pytest.mark.parametrize("whole", [False, True])
def test_there_one_mask_of_rows_replaces_it(whole: bool) -> None:
    values = feeds(whole=whole)
    count, made = fused_equally(partial(attention, -np.inf), mask_rows_once, **values)
    assert count == 1
    assert operators(made)["IsNaN"] == 0
    (got,) = run(made, **values)
    assert (got[1, :, 0] == 0).all() == whole


def without_guards(model: ir.Model) -> Any:
    drop_nan_guards(model)
    remove_dead(model)
    return group_heads(model)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_heads_of_a_group_share_keys_that_are_not_copied(groups: int) -> None:
    build = partial(attention, groups=groups)
    (found,) = find_attention(build())
    assert (found.heads, found.groups, found.scale) == (4, groups, pytest.approx(0.5))
    count, made = fused_equally(build, without_guards, **feeds(whole=True, groups=groups))
    assert count == 1
    assert operators(made)["Expand"] == 0
    assert operators(made)["Mul"] == 1, "the query alone is scaled"


def test_a_product_without_a_transposed_key_is_no_attention() -> None:
    made = attention(swap=False)
    assert not find_attention(made)
    assert group_heads(made) == (0, {})
