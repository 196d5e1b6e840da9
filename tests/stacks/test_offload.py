"""accelerate's offload after the rewrite: factors are loaded when a graph reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx import ConfigError, LoraConfig, MergeError
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted

accelerate = pytest.importorskip("accelerate")
TARGETS = {"layers": ["q_proj", "down_proj"], "ends": ["embed_tokens", "lm_head"]}


def offloaded(model: Any, folder: Path | None) -> Any:
    device = torch.device("cpu")
    if folder is None:
        return accelerate.cpu_offload(model, execution_device=device)
    return accelerate.disk_offload(model, folder, execution_device=device)


@pytest.mark.feature("accelerate offload", "switch")
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_outputs_are_those_of_the_whole_model(targets: str, place: str, tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=TARGETS[targets]))
    wanted = model(IDS).logits
    offloaded(model, None if place == "cpu" else tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_bits(model(IDS).logits, wanted)
    with lora_fx.disable_adapter(model):
        assert not torch.equal(model(IDS).logits, wanted)
    assert_same_bits(model(IDS).logits, wanted)


@pytest.mark.feature("accelerate offload", "save")
def test_saved_factors_have_their_values(tmp_path: Path) -> None:
    model = adapted()
    wanted = lora_fx.adapter_state_dict(model)
    offloaded(model, tmp_path)
    assert_same_bits(lora_fx.adapter_state_dict(model), wanted)


@pytest.mark.feature("accelerate offload", "train", "merge", refused=True)
def test_training_and_merging_are_refused_until_the_hooks_are_off() -> None:
    model = adapted()
    wanted = model(IDS).logits
    offloaded(model, None)
    with pytest.raises(ConfigError, match="is for inference"):
        model.train()(IDS)
    model.eval()
    with pytest.raises(MergeError, match=r"remove_hook_from_submodules"):
        lora_fx.merge(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same_bits(model(IDS).logits, wanted)
    assert_close(lora_fx.merge(model)(IDS).logits, wanted)
