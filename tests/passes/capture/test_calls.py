"""Models are called in other ways than they were traced, and compute the right result."""

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
BOTH = LoraConfig(r=2, target_modules=["w", "out"])


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
    """An argument that a trace fixes to its default."""

    def forward(self, x, scale=1.0):
        return super().forward(x * scale)


@pytest.mark.parametrize("frontend", ["auto", "regions", "export"])
@pytest.mark.parametrize("given", [None, 2.0])
def test_take_another_value_of_an_argument_that_a_trace_has_fixed(given, frontend) -> None:
    model, x = Scaled(), torch.randn(2, 5, 8)
    inputs = x if given is None else (x, given)
    adapted = randomize(lora_fx.rewrite(model, BOTH, inputs, frontend=frontend))
    merged = lora_fx.merge(adapted)
    for scale in (1.0, 2.0, 3.0):
        assert_close(adapted(x, scale), merged(x, scale), 1e-5)
        assert_close(adapted(x, scale=scale), merged(x, scale), 1e-5)
        assert not torch.allclose(adapted(x, scale), model(x, scale))


def test_take_an_argument_that_a_trace_left_out() -> None:
    model, x = Masked(), torch.randn(2, 5, 8)
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[1] = True
    for inputs in (None, x, (x, mask)):
        adapted = randomize(lora_fx.rewrite(model, BOTH, inputs))
        merged = lora_fx.merge(adapted)
        for args in ((x, mask), (x,), (x, None)):
            assert not torch.allclose(adapted(*args), model(*args))
            assert_close(adapted(*args), merged(*args), 1e-5)


@pytest.mark.parametrize(("inputs", "found"), [((), "v"), ((False,), "v"), ((True,), "w")])
def test_adapt_the_weights_of_the_branch_that_the_inputs_take(inputs, found) -> None:
    model, x = Flagged(), torch.randn(2, 8)
    given = (x, *inputs) if inputs else None
    config = LoraConfig(r=2, target_modules=["w", "v"])
    assert found in {row.name for row in lora_fx.plan(model, config, given)}
    adapted = randomize(lora_fx.rewrite(model, config, given))
    merged = lora_fx.merge(adapted)
    for flag in (False, True):
        assert_close(adapted(x, flag), merged(x, flag), 1e-5)
    assert not torch.allclose(adapted(x, *inputs), model(x, *inputs))


@pytest.mark.parametrize("frontend", ["auto", "regions", "export"])
def test_call_one_module_in_two_ways(frontend) -> None:
    model, x = Both(), torch.randn(2, 8)
    config = LoraConfig(r=2, target_modules=["w", "v"])
    adapted = randomize(lora_fx.rewrite(model, config, x, frontend=frontend))
    assert_close(adapted(x), lora_fx.merge(adapted)(x), 1e-5)
    assert not torch.allclose(adapted(x), model(x))


class Batches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 16))
        self.o = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return F.grouped_mm(F.grouped_mm(x, self.w).relu(), self.o)


def test_take_a_grouped_product_without_ends_for_a_batch_of_each_expert() -> None:
    model, x = Batches(), torch.randn(3, 4, 8)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["w", "o"]), x)
    assert_same_bits(adapted(x), model.requires_grad_(False)(x))
    randomize(adapted)
    assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-5)


def test_evaluate_an_exported_bert() -> None:
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
