"""Routers of mixtures of experts: found by what they decide, and adapted when they are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig


class Experts(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 8, 8))

    def forward(self, x, index, share):
        weight = self.up[index]
        return (torch.einsum("td,tkdf->tkf", x, weight) * share[..., None]).sum(1)


class InBlock(nn.Module):
    """The choice is made by the module that has the router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = Experts()

    def forward(self, x):
        share, index = torch.topk(torch.softmax(self.gate(x).float(), -1), 2, -1)
        return self.experts(x, index, share)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        scores = nn.functional.linear(x, self.weight).sigmoid()
        return scores, scores + self.bias


class OfItsOwn(nn.Module):
    """The router is a module, the choice in groups is made around it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = Experts()
        self.act = nn.Softmax(-1)

    def forward(self, x):
        scores, biased = self.router(x)
        groups = biased.view(-1, 2, 2).topk(1, dim=-1)[0].sum(-1)
        index = torch.topk(groups, 1, dim=1)[1] * 2
        return self.experts(x, index, self.act(scores).gather(1, index))


class FirstOfAll(nn.Module):
    """Each token goes to one expert of a list, which the router finds by ``argmax``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(dim=-1)
        return sum((chosen == n).unsqueeze(-1) * one(x) for n, one in enumerate(self.experts))


class Mixed(nn.Module):
    """Every expert sees every token: nothing is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = Experts()

    def forward(self, x):
        share = torch.softmax(self.gate(x), -1)
        index = torch.arange(4).expand(x.shape[0], 4)
        return self.experts(x, index, share)


class Codes(nn.Module):
    """A choice, and no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.book = nn.Embedding(4, 8)

    def forward(self, x):
        return self.book(self.gate(x).argmax(-1))


class Pooled(nn.Module):
    """The largest value of each class over the tokens, and as many layers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for one in self.layers:
            x = one(x)
        best = self.gate(x.unsqueeze(0)).max(1)[0]
        return x + best.sum()


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.moe = block()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.moe(self.first(x)))


def routers(model: nn.Module, config: LoraConfig | None = None) -> list[str]:
    plan = lora_fx.plan(model, config or LoraConfig(r=2))
    return [one.site.name for one in plan.skipped if "router" in one.reason]


@pytest.mark.parametrize(
    ("block", "name"),
    [(InBlock, "moe.gate"), (OfItsOwn, "moe.router"), (FirstOfAll, "moe.router")],
)
def test_what_chooses_experts_is_a_router(block, name) -> None:
    assert routers(Model(block)) == [name]
    assert "the router of a mixture of experts: name it" in str(
        lora_fx.plan(Model(block), LoraConfig(r=2))
    )


@pytest.mark.parametrize("frontend", ["symbolic", "regions", "export"])
def test_every_front_end_finds_it(frontend) -> None:
    x = torch.randn(5, 8)
    plan = lora_fx.plan(Model(InBlock), LoraConfig(r=2), frontend=frontend, example_inputs=(x,))
    assert [one.site.name for one in plan.skipped if one.site.router] == ["moe.gate"]


@pytest.mark.parametrize("block", [Mixed, Codes, Pooled])
def test_what_chooses_no_experts_is_adapted(block) -> None:
    assert routers(Model(block)) == []
    assert "moe.gate" in [row.name for row in lora_fx.plan(Model(block), LoraConfig(r=2))]


@pytest.mark.parametrize("targets", [["gate"], ".*gate", "all-linear"])
def test_a_router_is_adapted_when_it_is_named(targets) -> None:
    model = Model(InBlock)
    plan = lora_fx.plan(model, LoraConfig(r=2, target_modules=targets))
    assert "moe.gate" in [row.name for row in plan]
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=targets))
    assert adapted.moe.gate.lora_A.default.requires_grad


def test_a_second_run_changes_nothing() -> None:
    from lora_fx.passes.match.find_operations import match
    from lora_fx.passes.match.marks import find_routers

    captured = lora_fx.capture(Model(OfItsOwn))
    once = find_routers(captured, match(captured))
    assert find_routers(captured, once) == once
