"""Trainers keep ``module.forward`` and call it from what they set on the module: it runs what is active."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama


def accelerate_hook(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def accelerate_autocast(module: nn.Module) -> None:
    # What Accelerator(mixed_precision="bf16").prepare does, in fp32, so that numbers can be compared.
    utils = pytest.importorskip("accelerate.utils")
    module._original_forward = module.forward
    inside = torch.autocast("cpu", enabled=False)(module.forward.__func__)
    module.forward = types.MethodType(utils.convert_outputs_to_fp32(inside), module)


def compiled(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def closure(module: nn.Module) -> None:
    kept = module.forward

    @functools.wraps(kept)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kept(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


WAYS: list[Callable[[nn.Module], None]] = [
    accelerate_hook,
    accelerate_autocast,
    compiled,
    closure,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("where", ["", "lm_head", "model.layers.0.self_attn.q_proj"])
def test_a_kept_forward_runs_what_is_active(where: str, way: Callable[[nn.Module], None]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = adapted(config)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"]), "other")
    nn.init.normal_(model.lm_head.lora_B.other)
    on, off = model(IDS).logits, llama()(IDS).logits
    lora_fx.set_adapter(model, "other")
    other = model(IDS).logits
    lora_fx.set_adapter(model, "default")
    way(model.get_submodule(where))
    assert_same_bits(model(IDS).logits, on)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(IDS).logits, off)
    lora_fx.set_adapter(model, "other")
    assert_same_bits(model(IDS).logits, other)
    lora_fx.set_adapter(model, [])
    assert_same_bits(model(IDS).logits, off)
    lora_fx.set_adapter(model, "default")
    assert_same_bits(model(IDS).logits, on)
    assert_close(lora_fx.merge(model)(IDS).logits, on)


def test_an_accelerator_prepares_a_model_in_bf16() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with torch.autocast("cpu", torch.bfloat16):
        off = llama()(IDS).logits.float()
    on = prepared(IDS).logits
    assert on.dtype is torch.float32
    assert not torch.equal(on, off)
    with lora_fx.disable_adapter(model):
        assert_same_bits(prepared(IDS).logits, off)
    assert_same_bits(prepared(IDS).logits, on)
