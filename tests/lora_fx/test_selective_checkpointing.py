"""Selective activation checkpointing, which keeps the results of some operations: none is written into."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_fx
from tests.numerics import assert_close

KEPT = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "linear")}


def keep_products(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * self.k(x))


class Model(nn.Module):
    """Blocks that are checkpointed, unless ``mutation`` is None."""

    def __init__(self, mutation: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mutation = mutation

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.mutation is None:
                x = block(x)
                continue
            contexts = functools.partial(
                create_selective_checkpoint_contexts,
                keep_products,
                allow_cache_entry_mutation=self.mutation,
            )
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


@pytest.mark.parametrize("mutation", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_gradients_are_those_without_checkpoints(options: Any, mutation: bool) -> None:
    grads = []
    for chosen in (None, mutation):
        torch.manual_seed(0)
        config = lora_fx.LoraConfig(
            r=4, target_modules=["q", "k", "out"], init_lora_weights=False, seed=0, **options
        )
        model = lora_fx.rewrite(Model(chosen), config).train()
        torch.manual_seed(1)
        model(torch.randn(7, 16)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in grads[0].items():
        assert_close(grads[1][name], expected, 1e-6)


@pytest.mark.parametrize("mutation", [False, True])
def test_rows_of_several_adapters(mutation: bool) -> None:
    grads = []
    for chosen in (None, mutation):
        torch.manual_seed(0)
        config = lora_fx.LoraConfig(r=4, target_modules=["q", "out"], init_lora_weights=False)
        model = lora_fx.rewrite(Model(chosen), config, adapter_name="first")
        lora_fx.add_adapter(model, config, adapter_name="second")
        lora_fx.set_adapter(model, ["first", "second"], per_sample=True)
        with lora_fx.adapter_ids(model, ["first", "second", "first"]):
            model(torch.randn(3, 5, 16)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in grads[0].items():
        assert_close(grads[1][name], expected, 1e-6)
