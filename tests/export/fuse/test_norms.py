"""Normalization by the root mean square: its standard form, one operator, and with the residual sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest

from lora_fx.export.fuse.pointwise import (
    divide_by_root,
    find_norms,
    skip_layer_norms,
    skip_norms,
)
from tests.export.fuse.small import FLOAT, HALF, fused_equally, graph, operators

X = (FLOAT, ["batch", "sequence", 8])
CONSTANTS = {
    "two": np.float32(2),
    "last": np.array([-1]),
    "eps": np.float32(1e-5),
    "gain": np.linspace(0.5, 2, 8, dtype=np.float32),
}


def norm(inside: bool = True, axis: int = -1, half: bool = False) -> ir.Model:
    """x / sqrt(mean(x²) + eps) · gain, as PyTorch gives it; the near miss adds eps to the root."""
    wide = [oh.make_node("Cast", ["x"], ["w"], to=FLOAT)] if half else []
    w = "w" if half else "x"
    root = (
        [oh.make_node("Add", ["mean", "eps"], ["sum"]), oh.make_node("Sqrt", ["sum"], ["root"])]
        if inside
        else [oh.make_node("Sqrt", ["mean"], ["s"]), oh.make_node("Add", ["s", "eps"], ["root"])]
    )
    tail = (
        [
            oh.make_node("Cast", ["unit"], ["narrow"], to=HALF),
            oh.make_node("Mul", ["gain", "narrow"], ["y"]),
        ]
        if half
        else [oh.make_node("Mul", ["gain", "unit"], ["y"])]
    )
    nodes = [
        *wide,
        oh.make_node("Pow", [w, "two"], ["square"]),
        oh.make_node("ReduceMean", ["square", "last"], ["mean"], keepdims=1),
        *root,
        oh.make_node("Reciprocal", ["root"], ["inverse"]),
        oh.make_node("Mul", [w, "inverse"], ["unit"]),
        *tail,
    ]
    kind = (HALF if half else FLOAT, ["batch", "sequence", 8])
    gain = CONSTANTS["gain"].astype(np.float16) if half else CONSTANTS["gain"]
    constants = CONSTANTS | {"last": np.array([axis]), "gain": gain}
    return graph(nodes, {"x": kind}, {"y": kind}, constants)


def values(dtype: Any = np.float32) -> Any:
    return np.random.default_rng(0).normal(size=(2, 3, 8)).astype(dtype)


def test_a_norm_divides_by_its_root() -> None:
    count, made = fused_equally(norm, divide_by_root, x=values())
    assert count == 1
    assert operators(made)["Div"] == 1
    assert operators(made)["Reciprocal"] == 0


@pytest.mark.parametrize("half", [False, True])
def test_a_norm_is_found_with_its_casts(half: bool) -> None:
    (found,) = find_norms(norm(half=half))
    assert (found.x.name, found.gain.name, found.output.name) == ("x", "gain", "y")
    assert found.epsilon == pytest.approx(1e-5)


@pytest.mark.parametrize("changes", [{"inside": False}, {"axis": 1}])
def test_what_only_looks_like_a_norm_is_left(changes: Any) -> None:
    build = partial(norm, **changes)
    assert not find_norms(build())
    count, made = fused_equally(build, divide_by_root, x=values())
    assert count == 0
    assert operators(made) == operators(build())


def residual(other: Any = ("batch", "sequence", 8)) -> ir.Model:
    nodes = [
        oh.make_node("Add", ["a", "b"], ["total"]),
        oh.make_node("Pow", ["total", "two"], ["square"]),
        oh.make_node("ReduceMean", ["square", "last"], ["mean"], keepdims=1),
        oh.make_node("Add", ["mean", "eps"], ["sum"]),
        oh.make_node("Sqrt", ["sum"], ["root"]),
        oh.make_node("Div", ["total", "root"], ["unit"]),
        oh.make_node("Mul", ["gain", "unit"], ["normed"]),
        oh.make_node("Add", ["total", "normed"], ["y"]),
    ]
    return graph(nodes, {"a": X, "b": (FLOAT, list(other))}, {"y": X}, CONSTANTS)


def test_a_norm_adds_the_residual_that_is_read_again() -> None:
    count, made = fused_equally(residual, skip_norms, a=values(), b=values())
    assert count == 1
    assert operators(made) == {"SkipSimplifiedLayerNormalization": 1, "Add": 1}


def test_a_norm_of_no_sum_is_that_of_twice_its_input() -> None:
    count, made = fused_equally(norm, skip_norms, x=values())
    assert count == 1
    assert operators(made) == {"SkipSimplifiedLayerNormalization": 1}
    # Twice x could be more than fp16 holds.
    count, _ = skip_norms(norm(half=True))
    assert count == 0


def test_a_sum_that_broadcasts_is_no_residual() -> None:
    build = partial(residual, other=(1, 1, 8))
    _, made = fused_equally(build, skip_norms, a=values(), b=values()[:1, :1])
    assert operators(made) == {"SkipSimplifiedLayerNormalization": 1, "Add": 2}


def layer_norm(axis: int) -> ir.Model:
    nodes = [
        oh.make_node("Add", ["a", "b"], ["total"]),
        oh.make_node(
            "LayerNormalization", ["total", "gain", "bias"], ["normed"], axis=axis, epsilon=1e-5
        ),
        oh.make_node("Add", ["total", "normed"], ["y"]),
    ]
    shape = (FLOAT, ["batch", 8, 8]) if axis == 1 else X
    gain = np.ones((8, 8), np.float32) if axis == 1 else CONSTANTS["gain"]
    return graph(nodes, {"a": shape, "b": shape}, {"y": shape}, {"gain": gain, "bias": gain})


def test_a_layer_norm_adds_the_residual() -> None:
    count, made = fused_equally(partial(layer_norm, -1), skip_layer_norms, a=values(), b=values())
    assert count == 1
    assert operators(made) == {"SkipLayerNormalization": 1, "Add": 1}


def test_a_layer_norm_over_two_axes_is_left() -> None:
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    count, _ = fused_equally(partial(layer_norm, 1), skip_layer_norms, a=x, b=x)
    assert count == 0
