"""How adapters stand."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.zoo import Mlp, Residual, tiny_llama


def test_every_adapter_has_a_line() -> None:
    model = lora_fx.rewrite(Residual(), LoraConfig(r=2, rank_pattern={"down": 3}), adapter_name="a")
    lora_fx.add_adapter(
        model,
        LoraConfig(target_modules=["up"], modules_to_save=["head"], bias="lora_only"),
        "b",
    )
    a, b = lora_fx.status(model)
    assert (a.active, a.trainable, a.sites, a.ranks) == (True, True, 4, (2, 3))
    assert (b.active, b.trainable, b.sites, b.ranks) == (False, False, 2, (8, 8))
    assert a.parameters == sum(p.numel() for p in lora_fx.trainable_parameters(model))
    assert b.saved_modules == ("head",)
    assert str(lora_fx.status(model)).splitlines() == [
        f"a: active, trainable, 4 site(s) of rank 2 to 3, {a.parameters:,} parameters, float32 on cpu",
        (
            f"b: not active, frozen, 2 site(s) of rank 8, {b.parameters:,} parameters, float32 on cpu, "
            "trains head in full, trains 2 bias(es)"
        ),
        "unchecked: no eager call of the model with these adapters has been watched yet",
    ]
    lora_fx.set_adapter(model, "b")
    assert b.parameters == sum(p.numel() for p in lora_fx.trainable_parameters(model))
    model.blocks[0].up.lora_A.b.requires_grad_(False)
    assert next(x for x in lora_fx.status(model) if x.name == "b").trainable is None
    lora_fx.set_adapter(model, "a", per_sample=True)
    assert "each sample of a batch" in str(lora_fx.status(model))


def test_trained_tokens_are_counted() -> None:
    base, config = (
        tiny_llama()[0],
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).get_model_status()
    (ours,) = lora_fx.status(lora_fx.rewrite(base, LoraConfig(**config)))
    assert ours.tokens == (("model.embed_tokens", 2),)
    assert ours.parameters == theirs.trainable_params
    assert ours.sites + len(ours.tokens) == theirs.num_adapter_layers
    assert "trains 2 token(s) of model.embed_tokens" in str(ours)


def test_the_numbers_are_pefts() -> None:
    base = Residual()
    config = {"target_modules": ["up", "head"], "r": 3}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).get_model_status()
    (ours,) = lora_fx.status(lora_fx.rewrite(base, LoraConfig(**config)))
    assert ours.parameters == theirs.trainable_params
    assert ours.sites == theirs.num_adapter_layers


def test_no_sites_and_no_adapters() -> None:
    model = lora_fx.rewrite(
        Mlp().to(torch.bfloat16), LoraConfig(target_modules=[], modules_to_save=["second"])
    )
    (only,) = lora_fx.status(model)
    assert (only.sites, only.ranks, only.dtypes) == (0, None, ("bfloat16",))
    lora_fx.set_adapter(model, [])
    lora_fx.delete_adapter(model, "default")
    assert str(lora_fx.status(model)) == "no adapter"
    with pytest.raises(ConfigError, match="this Mlp has no adapters"):
        lora_fx.status(Mlp())
