"""Constant shapes, masks and positions that are read as a whole, and moves that cancel."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest

from lora_fx.export.fuse.graph import sizes
from lora_fx.export.fuse.shapes import drop_moves, fix_shapes, index_all, slice_positions
from tests.export.fuse.small import FLOAT, fused_equally, graph, operators

INT, BOOL = oh.TensorProto.INT64, oh.TensorProto.BOOL
VALUES = np.arange(48, dtype=np.float32).reshape(2, 3, 8)


def heads(second: str = "s") -> ir.Model:
    """[b, s, 8] as [b, s, 2, 4], the shape being computed; the near miss takes two sizes that differ."""
    nodes = [
        oh.make_node("Shape", ["x"], ["b"], start=0, end=1),
        oh.make_node("Shape", ["x"], ["s"], start=1, end=2),
        oh.make_node("Concat", ["b", second, "rest"], ["shape"], axis=0),
        oh.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    rest = np.array([2, 4]) if second == "s" else np.array([-1, 4])
    target = ["b", "s", 2, 4] if second == "s" else ["b", "b", "n", 4]
    return graph(nodes, {"x": (FLOAT, ["b", "s", 8])}, {"y": (FLOAT, target)}, {"rest": rest})


def test_a_shape_of_sizes_that_stay_is_constant() -> None:
    count, made = fused_equally(heads, fix_shapes, x=VALUES)
    assert count == 1
    assert operators(made) == {"Reshape": 1}


def test_a_shape_with_two_sizes_that_do_not_follow_is_computed() -> None:
    count, made = fused_equally(partial(heads, "b"), fix_shapes, x=VALUES)
    assert count == 0
    assert operators(made)["Concat"] == 1


def test_sizes_are_sums_in_one_order() -> None:
    nodes = [
        oh.make_node("Shape", ["a"], ["p"], start=0, end=1),
        oh.make_node("Shape", ["b"], ["s"], start=0, end=1),
        oh.make_node("Add", ["s", "p"], ["total"]),
    ]
    model = graph(nodes, {"a": (FLOAT, ["past"]), "b": (FLOAT, ["new"])}, {"total": (INT, [1])})
    assert sizes(model.graph.outputs[0]) == ("new + past",)


def looked_up(batch_first: bool = True) -> ir.Model:
    """mask[arange(b)[:, None, None, None], arange(t)], as transformers reads a padding mask."""
    rows, columns = ("b", "t") if batch_first else ("t", "b")
    nodes = [
        oh.make_node("Shape", ["mask"], ["b1"], start=0, end=1),
        oh.make_node("Shape", ["mask"], ["t1"], start=1, end=2),
        oh.make_node("Squeeze", ["b1"], ["b"]),
        oh.make_node("Squeeze", ["t1"], ["t"]),
        oh.make_node("Range", ["zero", rows, "one"], ["r"]),
        oh.make_node("Range", ["zero", columns, "one"], ["c"]),
        oh.make_node("Unsqueeze", ["r", "behind"], ["r4"]),
        oh.make_node("Unsqueeze", ["c", "before"], ["c4"]),
        oh.make_node("Max", ["r4", "c4"], ["both"]),
        oh.make_node("Shape", ["both"], ["wide"]),
        oh.make_node("Expand", ["r4", "wide"], ["rx"]),
        oh.make_node("Expand", ["c4", "wide"], ["cx"]),
        oh.make_node("Unsqueeze", ["rx", "end"], ["ri"]),
        oh.make_node("Unsqueeze", ["cx", "end"], ["ci"]),
        oh.make_node("Concat", ["ri", "ci"], ["index"], axis=-1),
        oh.make_node("GatherND", ["mask", "index"], ["y"]),
    ]
    model = graph(
        nodes,
        {"mask": (BOOL, ["b", "t"])},
        {"y": (BOOL, [rows, 1, 1, columns])},
        {
            "zero": np.int64(0),
            "one": np.int64(1),
            "behind": np.array([1, 2, 3]),
            "before": np.array([0, 1, 2]),
            "end": np.array([4]),
        },
    )
    shapes = {"r4": [rows, 1, 1, 1], "c4": [1, 1, 1, columns]}
    for node in model.graph:
        if node.outputs[0].name in shapes:
            node.outputs[0].shape = ir.Shape(shapes[node.outputs[0].name])
    return model


def test_a_mask_that_is_looked_up_whole_is_the_mask() -> None:
    mask = np.array([[True, False, True], [False, True, True]])
    count, made = fused_equally(looked_up, index_all, mask=mask)
    assert count == 1
    assert operators(made)["GatherND"] == 0


def test_a_mask_that_is_looked_up_transposed_is_left() -> None:
    count, _ = fused_equally(partial(looked_up, False), index_all, mask=np.eye(2, dtype=bool))
    assert count == 0


def positions(step: int = 1) -> ir.Model:
    """table[:, [past, …, past + new - 1]]; the near miss counts by two."""
    nodes = [
        oh.make_node("Shape", ["new"], ["n1"], start=1, end=2),
        oh.make_node("Squeeze", ["n1"], ["n"]),
        oh.make_node("Shape", ["cache"], ["p1"], start=1, end=2),
        oh.make_node("Squeeze", ["p1"], ["p"]),
        oh.make_node("Range", ["zero", "n", "step"], ["r"]),
        oh.make_node("Add", ["r", "p"], ["index"]),
        oh.make_node("Gather", ["table", "index"], ["y"], axis=1),
    ]
    return graph(
        nodes,
        {
            "table": (INT, ["b", "total"]),
            "new": (INT, ["b", "sequence"]),
            "cache": (INT, ["b", "past"]),
        },
        {"y": (INT, ["b", "m"])},
        {"zero": np.int64(0), "step": np.int64(step)},
    )


@pytest.mark.parametrize(("step", "found"), [(1, 1), (2, 0)])
def test_positions_that_count_up_are_a_slice(step: int, found: int) -> None:
    table = np.arange(14).reshape(2, 7)
    zeros = np.zeros((2, 3), np.int64)
    count, made = fused_equally(
        partial(positions, step), slice_positions, table=table, new=zeros, cache=zeros
    )
    assert count == found
    assert operators(made)["Slice"] == found


def moves(perm: tuple[int, ...]) -> ir.Model:
    nodes = [
        oh.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        oh.make_node("Transpose", ["t"], ["u"], perm=perm),
        oh.make_node("Neg", ["u"], ["y"]),
    ]
    target = [["b", "s", 8][[0, 2, 1][axis]] for axis in perm]
    return graph(nodes, {"x": (FLOAT, ["b", "s", 8])}, {"y": (FLOAT, target)})


@pytest.mark.parametrize(("perm", "found"), [((0, 2, 1), 1), ((1, 0, 2), 0)])
def test_two_transposes_that_cancel_are_left_out(perm: tuple[int, ...], found: int) -> None:
    count, made = fused_equally(partial(moves, perm), drop_moves, x=VALUES)
    assert count == found
    assert operators(made)["Transpose"] == 2 * (1 - found)
