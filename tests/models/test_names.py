"""Names that models use and generated code has to live with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from tests.numerics import assert_same_bits


class Inner(nn.Module):
    def __init__(this) -> None:
        super().__init__()
        this.fc = nn.Linear(4, 4)

    def forward(this, x):
        return (this.fc(x),)


class Attention(nn.Module):
    """As transformers' Swin v2 and Perceiver have it: a child named `self`."""

    def __init__(this) -> None:
        super().__init__()
        this.self = Inner()
        this.output = nn.Linear(4, 4)

    def forward(this, x):
        return this.output(this.self(x)[0])


def test_a_child_named_self() -> None:
    model, x = nn.Sequential(Attention(), nn.Linear(4, 2)), torch.randn(3, 4)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2), x)
    assert [row.name for row in lora_fx.plan(model, lora_fx.LoraConfig(r=2))] == [
        "0.self.fc",
        "0.output",
    ]
    assert_same_bits(adapted(x), model.requires_grad_(False)(x))
    assert_same_bits(lora_fx.merge(adapted)(x), model(x))


class Classifier(nn.Module):
    """A head at the end of a container, beside another container of the same class."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.add_module(name, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
        self.name = name

    def forward(self, x):
        return self.get_submodule(self.name)(self.features(x))


@pytest.mark.parametrize(("name", "head"), [("classifier", True), ("layers", False)])
def test_a_head_at_the_end_of_a_container_is_known_by_its_name(name: str, head: bool) -> None:
    plan = lora_fx.plan(Classifier(name), lora_fx.LoraConfig(r=2))
    assert [skipped.site.name for skipped in plan.skipped] == ([f"{name}.2"] if head else [])
