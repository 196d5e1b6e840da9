"""SiLU and the forms of gelu as single operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest

from lora_fx.export.fuse.graph import remove_dead
from lora_fx.export.fuse.pointwise import bias_gelu, fast_gelu, quick_gelu
from tests.export.fuse.small import FLOAT, fused_equally, graph, operators

X = (FLOAT, ["batch", "sequence", 8])
VALUES = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def silu(alpha: float | None, other: str = "x") -> ir.Model:
    """x · sigmoid(alpha · x), or with another tensor under the sigmoid."""
    inner = [] if alpha is None else [oh.make_node("Mul", [other, "alpha"], ["scaled"])]
    nodes = [
        *inner,
        oh.make_node("Sigmoid", ["scaled" if inner else other], ["gate"]),
        oh.make_node("Mul", ["x", "gate"], ["y"]),
    ]
    constants = {} if alpha is None else {"alpha": np.float32(alpha)}
    return graph(nodes, {"x": X, "z": X}, {"y": X}, constants)


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_silu_is_one_operator(alpha: float | None) -> None:
    count, made = fused_equally(partial(silu, alpha), quick_gelu, x=VALUES, z=VALUES)
    assert count == 1
    assert operators(made) == {"QuickGelu": 1}


def test_a_gate_of_another_tensor_is_left() -> None:
    count, _ = fused_equally(partial(silu, None, "z"), quick_gelu, x=VALUES, z=-VALUES)
    assert count == 0


def tanh_gelu(cubic: float) -> ir.Model:
    nodes = [
        oh.make_node("Mul", ["x", "half"], ["halved"]),
        oh.make_node("Pow", ["x", "three"], ["cube"]),
        oh.make_node("Mul", ["cube", "cubic"], ["bent"]),
        oh.make_node("Add", ["x", "bent"], ["sum"]),
        oh.make_node("Mul", ["sum", "root"], ["argument"]),
        oh.make_node("Tanh", ["argument"], ["tanh"]),
        oh.make_node("Add", ["tanh", "one"], ["plus"]),
        oh.make_node("Mul", ["halved", "plus"], ["y"]),
    ]
    numbers = {"half": 0.5, "three": 3, "cubic": cubic, "root": (2 / np.pi) ** 0.5, "one": 1}
    return graph(nodes, {"x": X}, {"y": X}, {k: np.float32(v) for k, v in numbers.items()})


def test_gelu_with_tanh_is_one_operator() -> None:
    count, made = fused_equally(partial(tanh_gelu, 0.044715), fast_gelu, x=VALUES)
    assert count == 1
    assert operators(made) == {"FastGelu": 1}


def test_another_polynomial_is_left() -> None:
    count, _ = fused_equally(partial(tanh_gelu, 0.05), fast_gelu, x=VALUES)
    assert count == 0


def biased(shape: Any, approximate: str = "none") -> ir.Model:
    nodes = [
        oh.make_node("Add", ["x", "bias"], ["sum"]),
        oh.make_node("Gelu", ["sum"], ["y"], approximate=approximate),
    ]
    bias = np.linspace(-1, 1, 8, dtype=np.float32).reshape(shape)
    return graph(nodes, {"x": X}, {"y": X}, {"bias": bias})


def test_a_gelu_adds_its_bias() -> None:
    count, made = fused_equally(partial(biased, (8,)), bias_gelu, x=VALUES)
    assert count == 1
    assert operators(made) == {"BiasGelu": 1}


def test_a_gelu_with_tanh_adds_its_bias() -> None:
    def both(model: ir.Model) -> Any:
        fast_gelu(model)
        remove_dead(model)
        return bias_gelu(model)

    count, made = fused_equally(partial(biased, (8,), "tanh"), both, x=VALUES)
    assert count == 1
    assert operators(made) == {"FastGelu": 1}


def test_what_is_no_bias_of_channels_is_left() -> None:
    count, _ = fused_equally(partial(biased, (1, 1, 8)), bias_gelu, x=VALUES)
    assert count == 0
