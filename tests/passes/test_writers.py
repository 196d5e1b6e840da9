"""Models that write into what an adapted operation gives: DoRA may not rely on it in its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.passes._writers import writes_in_place
from tests.algebra import randomise
from tests.numerics import assert_close


class Written(nn.Module):
    """A linear layer, something that writes into its output, and a head."""

    def __init__(self, kind: str, wide: int = 8) -> None:
        super().__init__()
        self.a, self.act, self.c = nn.Linear(16, wide), nn.ReLU(inplace=True), nn.Linear(wide, 2)
        if kind != "module":
            self.act = nn.Identity()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.a.bias, x, self.a.weight.T) if self.kind == "addmm" else self.a(x)
        if self.kind in ("method", "addmm"):
            y.relu_()
        elif self.kind == "function":
            y = torch.relu_(y)
        elif self.kind == "keyword":
            y = F.relu(y, inplace=True)
        elif self.kind == "operator":
            y += 1
        return self.c(self.act(y))


class Cut(nn.Module):
    """One weight for two, of which one is adapted; what comes out is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.act = nn.Linear(16, 12), nn.ReLU(inplace=True)
        self.c = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qk(x)
        q, k = y[..., :6], y[..., 6:]
        return self.c(self.act(q) * k)


KINDS = ["module", "method", "function", "keyword", "operator", "addmm"]


def check(base: nn.Module, x: Tensor, target: str, optimize: bool, **inputs: Any) -> None:
    """Trains, and its gradients are those of the formula."""
    config = lora_fx.LoraConfig(r=4, target_modules=[target], use_dora=True)
    model = lora_fx.rewrite(base, config, optimize=optimize, **inputs)
    randomise(model)
    model(x).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("magnitude" in name for name in got)
    step = 1e-6
    for name, parameter in model.named_parameters():
        if name in got:
            direction = torch.randn_like(parameter)
            if "lora_A" in name or "lora_B" in name:
                continue  # the norm is a constant for them (section 4.3 of the paper)
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                above = model(x).square().sum()
                parameter.sub_(direction, alpha=2 * step)
                below = model(x).square().sum()
                parameter.add_(direction, alpha=step)
            assert_close((got[name] * direction).sum(), (above - below) / (2 * step), 1e-5)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_before_something_that_writes(kind: str, optimize: bool) -> None:
    check(Written(kind).double(), torch.randn(3, 16).double(), "a", optimize)


@pytest.mark.parametrize("optimize", [True, False])
def test_with_example_inputs(optimize: bool) -> None:
    x = torch.randn(3, 16).double()
    base = Written("module").double()
    check(base, x, "a", optimize, example_inputs=x, frontend="export")


@pytest.mark.parametrize("optimize", [True, False])
def test_a_part_of_a_weight(optimize: bool) -> None:
    check(Cut().double(), torch.randn(3, 16).double(), "qk.0_6", optimize)


@pytest.mark.parametrize("optimize", [True, False])
def test_convolutions(optimize: bool) -> None:
    base = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 2))
    check(base.double(), torch.randn(3, 2, 4, 4).double(), "0", optimize)


# An operator that writes is recorded as the one that does not.
@pytest.mark.parametrize("kind", [*KINDS[:4], "addmm", "plain", "operator"])
def test_what_writes_is_seen_in_modules_and_graphs(kind: str) -> None:
    assert writes_in_place(lora_fx.capture(Written(kind))) == (kind not in ("plain", "operator"))


def test_a_model_that_does_not_write_keeps_its_output_instead_of_making_it_again() -> None:
    graphs = {}
    for kind in ("plain", "module"):
        config = lora_fx.LoraConfig(r=4, target_modules=["a"], use_dora=True)
        model = lora_fx.rewrite(Written(kind), config)
        (graphs[kind],) = (str(g) for name, g in lora_fx.graphs(model).items() if name == "a")
    assert graphs["plain"] != graphs["module"]
