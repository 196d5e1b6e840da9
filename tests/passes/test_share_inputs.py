"""The pass that makes one node of fused operations over one input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.runtime.kernels.fused_lora import lora_linear, lora_linears
from tests.golden import check_golden, printed
from tests.numerics import assert_close
from tests.passes.test_fuse import pair, run


class Attention(nn.Module):
    """q, k and v as parameters of one module, of unequal widths."""

    def __init__(self, between: Callable = lambda x: x) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, 5))
        self.k = nn.Parameter(torch.randn(5, 4))
        self.v = nn.Parameter(torch.randn(6, 5))
        self.v_bias = nn.Parameter(torch.randn(6))
        self.between = between

    def forward(self, x):
        x = x * 1.0
        q = F.linear(x, self.q)
        self.between(x)
        k = x @ self.k
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ F.linear(x, self.v, self.v_bias)


CONFIG = LoraConfig(
    r=2, target_modules=["q", "k", "v"], rank_pattern={"k": 3}, alpha_pattern={"v": 5}
)


def calls(model: nn.Module, target: Callable) -> int:
    graphs = lora_fx.graphs(model).values()
    return sum(node.target is target for graph in graphs for node in graph.nodes)


def test_siblings_over_one_input_are_one_call() -> None:
    model = lora_fx.rewrite(Attention(), CONFIG)
    assert (calls(model, lora_linears), calls(model, lora_linear)) == (1, 0)


def test_outputs_and_gradients_stay() -> None:
    shared, canonical = pair(Attention().double(), CONFIG)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(run(shared, x), run(canonical, x))


@pytest.mark.parametrize("frozen", [["q"], ["k", "v"], ["q", "k", "v"]])
def test_some_factors_are_frozen(frozen: list[str]) -> None:
    shared, canonical = pair(Attention().double(), CONFIG)
    for model in (shared, canonical):
        for name in frozen:
            getattr(model, f"{name}_lora").requires_grad_(False)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(run(shared, x), run(canonical, x))


def test_an_output_without_a_gradient() -> None:
    class Unused(Attention):
        def forward(self, x):
            q, k = F.linear(x, self.q), x @ self.k
            return q.detach() * k

    config = LoraConfig(r=2, target_modules=["q", "k"])
    shared, canonical = pair(Unused().double(), config)
    assert calls(shared, lora_linears) == 1
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for model in (shared, canonical):
        model(x).sum().backward()
    assert shared.q_lora.lora_A.default.grad is None
    assert_close(shared.k_lora.lora_A.default.grad, canonical.k_lora.lora_A.default.grad)
    assert_close(shared.k_lora.lora_B.default.grad, canonical.k_lora.lora_B.default.grad)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda x: x.add_(1), id="method"),
        pytest.param(lambda x: F.relu(x, True), id="flag"),
        pytest.param(lambda x: torch.add(x, 1, out=x), id="out"),
        pytest.param(lambda x: x.__setitem__(0, 1.0), id="setitem"),
    ],
)
def test_what_is_written_into_in_between_is_not_shared(between: Callable) -> None:
    base = Attention(between).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        model = lora_fx.rewrite(base, CONFIG)
        # q comes before, k and v after.
        assert (calls(model, lora_linears), calls(model, lora_linear)) == (1, 1)
        assert_close(model(x), base(x))


def test_dropout_is_drawn_for_each() -> None:
    config = LoraConfig(r=2, target_modules=["q", "k"], lora_dropout=0.5)
    assert calls(lora_fx.rewrite(Attention(), config), lora_linears) == 0


def test_layers_do_not_share_with_each_other() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x):
            return sum(F.linear(x, one.q) * (x @ one.k) for one in self.layers)

    model = lora_fx.rewrite(Decoder(), LoraConfig(r=2, target_modules=["q", "k"]))
    root = lora_fx.graphs(model)[""]
    assert sum(node.target is lora_linears for node in root.nodes) == 2


def test_golden() -> None:
    graph = lora_fx.graphs(lora_fx.rewrite(Attention(), CONFIG))[""]
    check_golden("share_inputs", printed(graph))
