"""What docs/integrations.md says of stacks that train a language model: the same tests on each of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lora_fx
from lora_fx import LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama
from tests.stacks.trainers import on_stacks, train

CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
DROPOUT = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)


def loaded(folder: Path) -> Any:
    """A base that was loaded from somewhere, as most are."""
    llama().save_pretrained(folder / "origin")
    return LlamaForCausalLM.from_pretrained(folder / "origin").eval()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@on_stacks("train")
def test_it_trains_as_peft_does(stack: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(CONFIG)
    lora_fx.save_adapter(ours, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
    before = lora_fx.adapter_state_dict(ours)
    train(stack, ours, tmp_path)
    train(stack, theirs, tmp_path)
    wanted = peft.get_peft_model_state_dict(theirs)
    found = lora_fx.adapter_state_dict(ours)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert not torch.equal(value, before[name]), name
        assert_close(value, wanted[name])


@on_stacks("activation checkpoints, reentrant")
def test_reentrant_checkpoints_change_nothing(stack: str, tmp_path: Path) -> None:
    compare_with_checkpoints("reentrant", stack, tmp_path)


@on_stacks("activation checkpoints, non-reentrant")
def test_non_reentrant_checkpoints_change_nothing(stack: str, tmp_path: Path) -> None:
    compare_with_checkpoints("non-reentrant", stack, tmp_path)


def compare_with_checkpoints(how: str, stack: str, folder: Path) -> None:
    model, other = adapted(DROPOUT), adapted(DROPOUT)
    train(stack, model, folder)
    train(stack, other, folder, activations=how)
    assert other.is_gradient_checkpointing
    assert_same_bits(trained(other), trained(model))


@on_stacks("resume, bit-equal")
def test_a_resumed_run_is_the_run(stack: str, tmp_path: Path) -> None:
    base = loaded(tmp_path)
    model = lora_fx.rewrite(base, DROPOUT)
    start = copy.deepcopy(model)
    train(stack, model, tmp_path, optimizer="adamw_torch")
    train(stack, start, tmp_path, optimizer="adamw_torch", resume=True)
    assert_same_bits(trained(start), trained(model))


@on_stacks("save")
def test_a_folder_has_the_adapter(stack: str, tmp_path: Path) -> None:
    base = loaded(tmp_path)
    model = train(stack, adapted(CONFIG, base), tmp_path).eval()
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size < sum(parameter.nbytes for parameter in base.parameters())
    again = lora_fx.load_adapter(base, tmp_path / "out")
    assert_close(again(IDS).logits, model(IDS).logits)


@on_stacks("switch")
def test_adapters_are_switched(stack: str, tmp_path: Path) -> None:
    model = train(stack, adapted(CONFIG), tmp_path).eval()
    on, off = model(IDS).logits, llama()(IDS).logits
    assert not torch.equal(on, off)
    with lora_fx.disable_adapter(model):
        assert_same_bits(model(IDS).logits, off)
    lora_fx.set_adapter(model, [])
    assert_same_bits(model(IDS).logits, off)
    lora_fx.set_adapter(model, "default")
    assert_same_bits(model(IDS).logits, on)


@on_stacks("merge")
def test_it_is_merged(stack: str, tmp_path: Path) -> None:
    model = train(stack, adapted(CONFIG), tmp_path).eval()
    merged = lora_fx.merge(model)
    assert type(merged) is LlamaForCausalLM
    assert_close(merged(IDS).logits, model(IDS).logits)


@on_stacks("export", pytest.mark.slow)
def test_it_is_exported(stack: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = train(stack, adapted(CONFIG), tmp_path).eval()
    lora_fx.export_onnx(lora_fx.merge(model), tmp_path / "model.onnx", {"input_ids": IDS})
    session = lora_fx.OnnxSession(tmp_path / "model.onnx", provider="cpu")
    logits = torch.as_tensor(session.run({"input_ids": IDS})["logits"])
    torch.testing.assert_close(logits, model(IDS).logits.detach(), rtol=1e-3, atol=1e-4)
