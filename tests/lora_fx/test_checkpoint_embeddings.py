"""Folders with weights of embeddings and heads, for a vocabulary that is not the base's: as PEFT has them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import tiny_llama

TARGETS = (["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"])
pytestmark = pytest.mark.filterwarnings("ignore")


def bases(folder: Path, tied: bool) -> tuple[Any, Any, torch.Tensor]:
    """Two models of one checkpoint with three more tokens, of which each has its own start."""
    model = tiny_llama(tie_word_embeddings=tied)[0]
    model.save_pretrained(folder)
    size = model.config.vocab_size
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        one = type(model).from_pretrained(folder).eval()
        one.resize_token_embeddings(size + 3, mean_resizing=False)
        found.append(one)
    return *found, torch.tensor([[0, 1, size, size + 2]])


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def keys(folder: Path) -> set[str]:
    return set(safetensors.torch.load_file(folder / "adapter_model.safetensors"))


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", TARGETS, ids=lambda one: one[-1])
def test_a_resized_vocabulary_is_in_the_folder(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    base, other, ids = bases(tmp_path / "base", tied)
    with_other = run(other, ids)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    folder = lora_fx.save_adapter(model, tmp_path / "ours")
    assert {"base_model.model.lm_head", "base_model.model.model.embed_tokens"} <= {
        key.removesuffix(".weight").removesuffix(".base_layer") for key in keys(folder)
    }
    loaded = lora_fx.load_adapter(other, folder)
    assert_close(run(loaded, ids), run(model, ids))
    assert_close(run(in_peft(other, folder), ids), run(model, ids))
    assert_close(run(lora_fx.merge(loaded), ids), run(model, ids))
    assert_same_bits(run(other, ids), with_other)
    with lora_fx.disable_adapter(loaded):
        assert_same_bits(run(loaded, ids), with_other)
    # They come with the adapter and are not trained; what is loaded can be saved again, and loaded again.
    lora_fx.set_adapter(loaded, "default")
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert str(lora_fx.status(loaded)) == str(lora_fx.status(model))
    again = lora_fx.save_adapter(loaded, tmp_path / "again")
    assert keys(again) == keys(folder)
    randomize(loaded)
    lora_fx.load_adapter(loaded, again)
    assert_close(run(loaded, ids), run(model, ids))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_folder_of_peft(tied: bool, tmp_path: Path) -> None:
    base, other, ids = bases(tmp_path / "base", tied)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(run(lora_fx.load_adapter(other, tmp_path / "theirs"), ids), run(theirs, ids))
    assert keys(
        lora_fx.save_adapter(lora_fx.rewrite(base, LoraConfig(**settings)), tmp_path / "o")
    ) == (keys(tmp_path / "theirs"))
    # Beside another adapter, whose embeddings stay as they are.
    model = lora_fx.rewrite(other, LoraConfig(**settings))
    before = run(model, ids)
    lora_fx.load_adapter(model, tmp_path / "theirs", adapter_name="new")
    assert_same_bits(run(model, ids), before)
    lora_fx.set_adapter(model, "new")
    assert_close(run(model, ids), run(theirs, ids))
    lora_fx.set_adapter(model, "default")
    with pytest.raises(ConfigError, match=r"'new' cannot be combined: its folder had other values"):
        lora_fx.add_weighted_adapter(model, ["new"], [1.0], "other")
    lora_fx.delete_adapter(model, "new")
    assert_same_bits(run(model, ids), before)
    assert not [name for name, _ in model.named_parameters() if "lora_own" in name]


def test_what_is_saved_is_chosen_as_in_peft(tmp_path: Path) -> None:
    base = tiny_llama()[0]
    for targets in TARGETS:
        settings = {"r": 2, "target_modules": targets}
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
        model = lora_fx.rewrite(base, LoraConfig(**settings))
        for how in ("auto", False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=how)
            found = lora_fx.adapter_state_dict(model, save_embedding_layers=how)
            assert found.keys() == expected.keys()
        both = lora_fx.adapter_state_dict(model, save_embedding_layers=True)
        assert sum("lm_head" in key or "embed_tokens" in key for key in both) >= 2
    with pytest.raises(ConfigError, match="save_embedding_layers: found 'no'"):
        lora_fx.save_adapter(model, tmp_path, save_embedding_layers="no")


def test_other_weights_of_the_base_are_still_refused(tmp_path: Path) -> None:
    base, other, _ = bases(tmp_path / "base", False)
    folder = lora_fx.save_adapter(lora_fx.rewrite(base, LoraConfig(r=2)), tmp_path / "ours")
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    norm = other.model.norm.weight.detach() + 1
    safetensors.torch.save_file({**tensors, "base_model.model.model.norm.weight": norm}, path)
    with pytest.raises(CheckpointError, match=r"other base: model\.norm\.weight"):
        lora_fx.load_adapter(other, folder)
    safetensors.torch.save_file(tensors, path)
    small = tiny_llama()[0]
    with pytest.raises(CheckpointError, match=r"shape: (model\.embed_tokens|lm_head)\.weight"):
        lora_fx.load_adapter(small, folder)
