"""Example inputs say how a model will be called: what is captured has to hold for that call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import CaptureError, LoraConfig
from tests.algebra import randomise
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


def test_an_argument_that_the_trace_left_out_makes_auto_export() -> None:
    model, x = Masked(), torch.randn(2, 5, 8)
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[1] = True
    plan = lora_fx.plan(model, CONFIG, (x, mask))
    assert plan.frontend == "export"
    assert any("expected mask is None" in note for note in plan.notes)
    adapted = randomise(lora_fx.rewrite(model, CONFIG, (x, mask)))
    assert_close(lora_fx.merge(adapted)(x, mask), adapted(x, mask), 1e-5)
    assert lora_fx.plan(model, CONFIG, x).frontend == "symbolic"


def test_the_branch_that_the_call_takes_is_the_one_that_is_adapted() -> None:
    plan = lora_fx.plan(
        Flagged(), LoraConfig(r=2, target_modules=["w", "v"]), (torch.randn(2, 8), True)
    )
    assert [row.name for row in plan] == ["w"]


def test_two_ways_of_calling_one_module_are_both_seen_by_an_export() -> None:
    model, x = Both(), torch.randn(2, 8)
    config = LoraConfig(r=2, target_modules=["w", "v"])
    adapted = randomise(lora_fx.rewrite(model, config, x))
    assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-5)
    with pytest.raises(CaptureError, match="expected flag is False"):
        lora_fx.rewrite(model, config, x, frontend="regions")


class Batches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 16))
        self.o = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return F.grouped_mm(F.grouped_mm(x, self.w).relu(), self.o)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch.nn.functional has no grouped_mm")
def test_a_grouped_product_without_ends_is_a_batch_for_each_expert() -> None:
    model, x = Batches(), torch.randn(3, 4, 8)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["w", "o"]), x)
    assert_same_bits(adapted(x), model.requires_grad_(False)(x))
    randomise(adapted)
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
