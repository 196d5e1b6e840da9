"""lora_fx.reference: the model as it is now, whatever is trained afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_same_bits
from tests.stacks.models import IDS, adapted, llama
from tests.stacks.test_left_behind import prepared

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.5},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}


def train(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_does_not_reach_it(name: str) -> None:
    model = adapted(LoraConfig(r=2, **CONFIGS[name]))
    model.model.norm.weight.requires_grad_(True)  # trained by hand
    train(model)
    before = model(IDS).logits
    reference = lora_fx.reference(model)
    assert type(reference).__name__ == type(model).__name__
    assert not reference.training
    assert not list(lora_fx.trainable_parameters(reference))
    assert_same_bits(reference(IDS).logits, before)
    train(model)
    assert not torch.equal(model(IDS).logits, before)
    assert_same_bits(reference(IDS).logits, before)


def test_it_shares_what_is_not_trained() -> None:
    model = adapted()
    reference = lora_fx.reference(model)
    for name, parameter in reference.named_parameters():
        shared = parameter.data_ptr() == model.get_parameter(name).data_ptr()
        assert shared is ("lora_" not in name), name


def test_it_is_what_is_active_now() -> None:
    model = adapted()
    with lora_fx.disable_adapter(model):
        assert_same_bits(lora_fx.reference(model)(IDS).logits, llama()(IDS).logits)
    lora_fx.set_adapter(model, [])
    assert_same_bits(lora_fx.reference(model)(IDS).logits, llama()(IDS).logits)


def test_it_leaves_out_what_a_trainer_has_set() -> None:
    model = adapted()
    wanted = model(IDS).logits
    prepared(model)
    reference = lora_fx.reference(model)
    assert "forward" not in vars(reference)
    assert_same_bits(reference(IDS).logits, wanted)
    assert_same_bits(copy.deepcopy(reference)(IDS).logits, wanted)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no adapters"):
        lora_fx.reference(llama())
