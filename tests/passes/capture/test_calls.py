"""Example inputs say how a model will be called: what is captured has to hold for that call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits

CONFIG = LoraConfig(r=2)


class Masked(nn.Module):
    """A weight of its own, and an argument that a trace without it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = x @ self.w
        if mask is not None:
            y = y.masked_fill(mask, 0)
        return self.out(torch.relu(y))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.v = nn.Parameter(torch.randn(8, 8))

    def forward(self, x, flag=False):
        return torch.tanh(x @ self.w if flag else x @ self.v)


class Both(nn.Module):
    """Calls a child in two ways, which no one graph stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Flagged()

    def forward(self, x):
        return self.child(x, True) + self.child(x, flag=False)


class Scaled(Masked):
    """An argument of which nobody can know what else it may be."""

    def forward(self, x, scale=1.0):
        return super().forward(x * scale)


def test_an_argument_that_the_trace_has_fixed_makes_auto_export() -> None:
    model, x = Scaled(), torch.randn(2, 5, 8)
    plan = lora_fx.plan(model, CONFIG, (x, 2.0))
    assert plan.frontend == "export"
    assert any("expected scale == 1.0" in note for note in plan.notes)
    adapted = randomize(lora_fx.rewrite(model, CONFIG, (x, 2.0)))
    assert_close(lora_fx.merge(adapted)(x, 2.0), adapted(x, 2.0), 1e-5)
    assert lora_fx.plan(model, CONFIG, x).frontend == "symbolic"


def test_an_argument_that_the_trace_left_out_has_a_graph_of_its_own() -> None:
    model, x = Masked(), torch.randn(2, 5, 8)
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[1] = True
    assert lora_fx.plan(model, CONFIG, (x, mask)).frontend == "symbolic"
    for inputs in (None, x, (x, mask)):
        adapted = randomize(lora_fx.rewrite(model, CONFIG, inputs))
        assert_close(lora_fx.merge(adapted)(x, mask), adapted(x, mask), 1e-5)
        assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-5)


def test_the_weights_of_every_branch_are_adapted() -> None:
    model, x = Flagged(), torch.randn(2, 8)
    config = LoraConfig(r=2, target_modules=["w", "v"])
    assert {row.name for row in lora_fx.plan(model, config, (x, True))} == {"w", "v"}
    adapted = randomize(lora_fx.rewrite(model, config))
    merged = lora_fx.merge(adapted)
    for flag in (False, True):
        assert not torch.equal(adapted(x, flag), model(x, flag))
        assert_close(merged(x, flag), adapted(x, flag), 1e-5)


@pytest.mark.parametrize("frontend", ["auto", "regions", "export"])
def test_two_ways_of_calling_one_module_are_both_seen(frontend) -> None:
    model, x = Both(), torch.randn(2, 8)
    config = LoraConfig(r=2, target_modules=["w", "v"])
    adapted = randomize(lora_fx.rewrite(model, config, x, frontend=frontend))
    assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-5)


class Batches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 16))
        self.o = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return F.grouped_mm(F.grouped_mm(x, self.w).relu(), self.o)


def test_a_grouped_product_without_ends_is_a_batch_for_each_expert() -> None:
    model, x = Batches(), torch.randn(3, 4, 8)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["w", "o"]), x)
    assert_same_bits(adapted(x), model.requires_grad_(False)(x))
    randomize(adapted)
    assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-5)


def test_an_exported_bert_can_be_evaluated() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1, 50, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapted = lora_fx.rewrite(model, CONFIG, inputs, frontend="export").eval()
    with torch.no_grad():
        found, expected = adapted(**inputs), model(**inputs)
    assert_same_bits(found.last_hidden_state, expected.last_hidden_state)
    assert_same_bits(adapted(ids)[0], model(ids)[0])
