"""torch.nn.utils.prune on a rewritten model: it puts a computed tensor where a parameter was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import lora_fx
from lora_fx import LoraConfig, MergeError
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True),
}


def layers(model: Any) -> list[torch.nn.Module]:
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.o_proj]


def pruned(model: Any, *, permanent: bool = False) -> Any:
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)
        if permanent:
            prune.remove(layer, "weight")
    return model


@pytest.mark.feature("torch.nn.utils.prune", "train", "save", "switch")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs_trains_and_switches(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name])
    model(IDS)  # watched before
    pruned(model)
    # The same adapter over weights that are what they are: it is saved and loaded without the masks.
    lora_fx.save_adapter(model, tmp_path)
    other = lora_fx.load_adapter(llama(), tmp_path)
    pruned(other, permanent=True)
    assert_close(model(IDS).logits, other(IDS).logits)
    for one in (model, other):
        one(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is ("lora_" in name), name
        if parameter.grad is not None:
            assert_close(parameter.grad, other.get_parameter(name).grad)
    lora_fx.status(model)
    with lora_fx.disable_adapter(model):
        assert_close(model(IDS).logits, pruned(llama())(IDS).logits)
    lora_fx.set_adapter(model, "default")
    assert_close(model(IDS).logits, other(IDS).logits)


@pytest.mark.feature("torch.nn.utils.prune", "merge")
def test_a_merge_waits_until_it_is_permanent() -> None:
    model = pruned(adapted())
    with pytest.raises(MergeError, match=r"q_proj\.weight is computed .*prune\.remove"):
        lora_fx.merge(model)
    wanted = model(IDS).logits
    for layer in layers(model):
        prune.remove(layer, "weight")
    assert_same_bits(model(IDS).logits, wanted)
    assert_close(lora_fx.merge(model)(IDS).logits, wanted)
