"""What is computed for the last token alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx.helper as oh
import onnx_ir as ir

from lora_fx.export.fuse.shapes import keep_last_token
from tests.export.fuse.small import FLOAT, fused_equally, graph, operators

X = (FLOAT, ["batch", "sequence", 8])
LAST = (FLOAT, ["batch", 1, 8])
VALUES = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
CONSTANTS = {
    "weight": np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32),
    "gain": np.linspace(0.5, 2, 8, dtype=np.float32),
    "start": np.array([-1]),
    "end": np.array([2**63 - 1]),
    "one": np.array([1]),
}


def block(start: int = -1, *, seen: bool = False, mixing: bool = False) -> ir.Model:
    """x + norm(x)·W and its last token; ``mixing`` takes a softmax over tokens in between."""
    nodes = [
        oh.make_node("LayerNormalization", ["x", "gain"], ["normed"], axis=-1),
        oh.make_node("MatMul", ["normed", "weight"], ["product"]),
        oh.make_node("Softmax", ["product"], ["mixed"], axis=1),
        oh.make_node("Add", ["x", "mixed" if mixing else "product"], ["sum"]),
        oh.make_node("Slice", ["sum", "start", "end", "one", "one"], ["y"]),
    ]
    if seen:
        nodes.append(oh.make_node("Identity", ["sum"], ["whole"]))
    nodes = [node for node in nodes if mixing or node.op_type != "Softmax"]
    outputs = {"y": LAST, "whole": X} if seen else {"y": LAST}
    return graph(nodes, {"x": X}, outputs, CONSTANTS | {"start": np.array([start])})


def test_the_last_token_alone_is_computed() -> None:
    count, made = fused_equally(block, keep_last_token, x=VALUES)
    assert count == 3
    assert next(node.op_type for node in made.graph) == "Slice"
    assert operators(made)["Slice"] == 1


def test_what_is_read_whole_is_computed_whole() -> None:
    count, _ = fused_equally(partial(block, seen=True), keep_last_token, x=VALUES)
    assert count == 0


def test_what_mixes_tokens_stays_in_front() -> None:
    count, made = fused_equally(partial(block, mixing=True), keep_last_token, x=VALUES)
    assert count == 1, "the sum"
    before = [node.op_type for node in made.graph]
    assert before.index("Softmax") < before.index("Add")


def test_another_part_is_left() -> None:
    def cut(model: ir.Model) -> Any:
        return keep_last_token(model)

    wide = partial(block, -2)
    made = wide()
    assert cut(made) == (0, {})
