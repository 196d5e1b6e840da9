"""Wrappers that checkpoint the activations of layers, put on after the rewrite or before it."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)

import lora_fx
from lora_fx import LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS
from tests.zoo import tiny_llama

CONFIG = LoraConfig(seed=0, r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def wrap(model: nn.Module) -> None:
    apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer"
    )


def wrap_twice(model: nn.Module) -> None:
    wrap(model)
    both = functools.partial(checkpoint_wrapper)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=both, check_fn=lambda m: type(m).__name__ == "LlamaMLP"
    )


def offload(model: nn.Module) -> None:
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = offload_wrapper(layer)


def wrap_as_accelerate(model: nn.Module, offload: bool = False) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        activation_checkpointing=True,
        activation_checkpointing_offload=offload,
    )
    # It reads nothing else of the accelerator, which has a plugin on GPUs only.
    state = SimpleNamespace(fsdp_plugin=plugin)
    fsdp2_apply_ac(SimpleNamespace(state=state), model)


WRAPS = {
    "layers": wrap,
    "layers and parts": wrap_twice,
    "offload": offload,
    "accelerate": wrap_as_accelerate,
    "accelerate, offload": functools.partial(wrap_as_accelerate, offload=True),
}


def before(wraps: str) -> nn.Module:
    base = tiny_llama()[0]
    WRAPS[wraps](base)
    return lora_fx.rewrite(base, CONFIG)


def after(wraps: str) -> nn.Module:
    model = lora_fx.rewrite(tiny_llama()[0], CONFIG)
    WRAPS[wraps](model)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.train()
    loss = model(IDS, labels=IDS).loss
    return list(torch.autograd.grad(loss, list(lora_fx.trainable_parameters(model))))


@pytest.mark.parametrize("wraps", WRAPS)
@pytest.mark.parametrize("wrapped", [before, after])
def test_every_verb_works_on_what_is_inside(wrapped, wraps: str, tmp_path: Path) -> None:
    model, plain = wrapped(wraps), lora_fx.rewrite(tiny_llama()[0], CONFIG)
    count = sum(type(one).__name__.endswith("Wrapper") for one in model.modules())
    assert count == (4 if wraps in ("layers and parts", "accelerate, offload") else 2)
    assert_close(gradients(model), gradients(plain))
    model.eval(), plain.eval()

    assert str(lora_fx.status(model)) == str(lora_fx.status(plain))
    lora_fx.save_adapter(model, tmp_path / "wrapped")
    lora_fx.save_adapter(plain, tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (
            tmp_path / "plain" / file
        ).read_bytes()
    assert lora_fx.adapter_state_dict(model).keys() == lora_fx.adapter_state_dict(plain).keys()
    merged = lora_fx.merge(model)
    assert_same_bits(merged(IDS).logits, lora_fx.merge(plain)(IDS).logits)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(IDS).logits, tiny_llama()[0](IDS).logits)
    with lora_fx.adapter_ids(model, [None, "default"]):
        model(IDS[:1].repeat(2, 1))
    assert sum(type(one).__name__.endswith("Wrapper") for one in model.modules()) == count


def test_a_base_with_checkpoints_loads_an_adapter_and_is_planned(tmp_path: Path) -> None:
    plain = lora_fx.rewrite(tiny_llama()[0], CONFIG)
    lora_fx.save_adapter(plain, tmp_path)
    base = tiny_llama()[0]
    wrap(base)
    assert str(lora_fx.plan(base, CONFIG)) == str(lora_fx.plan(tiny_llama()[0], CONFIG))
    loaded = lora_fx.load_adapter(base, tmp_path)
    assert_close(loaded(IDS).logits, plain(IDS).logits)
    for model in (base, loaded):
        assert sum(isinstance(one, CheckpointWrapper) for one in model.modules()) == 2


def test_a_model_that_is_checkpointed_as_a_whole() -> None:
    model = lora_fx.rewrite(checkpoint_wrapper(tiny_llama()[0]), CONFIG)
    assert isinstance(model, CheckpointWrapper)
    plain = lora_fx.rewrite(tiny_llama()[0], CONFIG)
    assert_close(gradients(model), gradients(plain))
    assert str(lora_fx.status(model)) == str(lora_fx.status(plain))
