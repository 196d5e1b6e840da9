"""A rewritten model as a PeftModel: TRL finds its reference, and checkpoints cross between PEFT and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import fsdp_utils
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama
from tests.stacks.trainers import tokenizer, trainer_options

TARGETS = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
# Rounded to no 256th, so that masks of both libraries would differ.
EXACT = {**TARGETS, "lora_dropout": 0.0}
DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(1, 60, (16, 6), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def of_ours(base: Path) -> Any:
    set_seed(1)
    model = LlamaForCausalLM.from_pretrained(base)
    return lora_fx.as_peft_model(lora_fx.rewrite(model, LoraConfig(**EXACT)))


def of_peft(base: Path) -> Any:
    set_seed(1)
    return peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**EXACT))


def trained(model: Any, folder: Path, resume: Path | None = None) -> tuple[Any, list[float]]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(("first", "second"), [(of_ours, of_peft), (of_peft, of_ours)])
def test_checkpoints_of_either_are_resumed_by_the_other(
    first: Callable[[Path], Any], second: Callable[[Path], Any], base: Path, tmp_path: Path
) -> None:
    whole, losses = trained(first(base), tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoint-3"
    # The weights are there once.
    files = [path.name for path in checkpoint.glob("*.safetensors")]
    assert files == ["adapter_model.safetensors"]
    resumed, again = trained(second(base), tmp_path / "second", checkpoint)
    assert again[:3] == losses[:3]
    assert again == pytest.approx(losses, abs=1e-6)
    states = [
        [state[key] for state in one.optimizer.state_dict()["state"].values() for key in state]
        for one in (whole, resumed)
    ]
    assert_close(*states)
    for folder in ("first", "second"):
        end = tmp_path / folder / "checkpoint-6" / "adapter_model.safetensors"
        assert len(safetensors.torch.load_file(end)) == 8


def test_the_state_is_restored_bit_for_bit(base: Path, tmp_path: Path) -> None:
    trained(of_peft(base), tmp_path / "theirs")
    checkpoint = tmp_path / "theirs" / "checkpoint-3"
    ours = of_ours(base)
    ours.load_adapter(checkpoint, "default", is_trainable=True)
    stored = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    found = lora_fx.adapter_state_dict(ours.get_base_model())
    assert_same_bits(found, {name: stored[name] for name in found})


def test_what_libraries_ask_of_a_peft_model(tmp_path: Path) -> None:
    model = adapted(LoraConfig(**TARGETS)).eval()
    wrapped = lora_fx.as_peft_model(model)
    assert isinstance(wrapped, peft.PeftModel)
    assert wrapped.get_base_model() is model
    assert_same_bits(wrapped(IDS).logits, model(IDS).logits)
    config = wrapped.peft_config["default"]
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.target_modules) == (2, {"q_proj", "down_proj"})
    assert wrapped.active_adapter == "default"
    assert wrapped.active_adapters == ["default"]
    with wrapped.disable_adapter():
        assert_same_bits(wrapped(IDS).logits, llama()(IDS).logits)
    wrapped.add_adapter("other", config)
    wrapped.set_adapter("other")
    assert lora_fx.active_adapters(model) == ("other",)
    wrapped.set_adapter("default")
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_config.json").is_file()
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(theirs(IDS).logits, wrapped(IDS).logits)
    wrapped.delete_adapter("other")
    assert_close(wrapped.merge_and_unload()(IDS).logits, wrapped(IDS).logits)
    names = {name for name, _ in wrapped.named_parameters()}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default" in names
    wrapped.train()
    assert model.training
    with pytest.raises(ConfigError, match="no adapter 'lost'"):
        wrapped.save_pretrained(tmp_path, selected_adapters=["lost"])
    with pytest.raises(ConfigError, match="has no adapters"):
        lora_fx.as_peft_model(nn.Linear(2, 2))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_checkpoints_of_fsdp_that_would_fail_are_named_before_the_training(
    version: int, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=kind)
    # accelerate puts it there by itself on GPUs only.
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    model = lora_fx.as_peft_model(adapted(LoraConfig(**TARGETS)))
    assert "accelerate" not in caplog.text
    model.train()
    model.eval().train()
    works = (version, kind) == (2, "FULL_STATE_DICT")
    assert caplog.text.count(r"model.get_base_model()") == (0 if works else 1)
    options = fsdp_utils._prepare_sd_options(plugin)
    if works:
        state = fsdp_utils._get_model_state_dict(model, adapter_only=True, sd_options=options)
        assert state.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    else:
        with pytest.raises(ConfigError, match=r"model\.get_base_model\(\)"):
            fsdp_utils._get_model_state_dict(model, adapter_only=True, sd_options=options)


def preferences() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}] * 8)


@pytest.mark.stack
def test_dpo_takes_the_trained_adapter_as_the_reference(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = lora_fx.as_peft_model(adapted(LoraConfig(**EXACT)))
    options = {**trainer_options("sgd", None), "max_steps": 2, "logging_strategy": "steps"}
    arguments = trl.DPOConfig(str(tmp_path), bf16=False, logging_steps=1, **options)
    run = trl.DPOTrainer(
        model, None, arguments, train_dataset=preferences(), processing_class=tokenizer()
    )
    assert run.ref_model is None
    before = lora_fx.adapter_state_dict(model.get_base_model(), "ref")
    run.train()
    first, second = [row["loss"] for row in run.state.log_history if "rewards/margins" in row]
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second != first
    assert_same_bits(lora_fx.adapter_state_dict(model.get_base_model(), "ref"), before)
    assert lora_fx.active_adapters(model.get_base_model()) == ("default",)


@pytest.mark.stack
@pytest.mark.parametrize("trained", [True, False])
def test_dpo_says_that_a_plain_model_gets_the_base(
    trained: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trl = pytest.importorskip("trl")
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base=base) if trained else lora_fx.rewrite(base, LoraConfig(**EXACT))
    options = {**trainer_options("sgd", None), "max_steps": 2}
    arguments = trl.DPOConfig(str(tmp_path / "run"), bf16=False, **options)
    data = {"train_dataset": preferences(), "processing_class": tokenizer()}
    trl.DPOTrainer(model, None, arguments, **data)
    assert ("without the adapter" in caplog.text) is trained
    caplog.clear()
    trl.DPOTrainer(model, lora_fx.reference(model), arguments, **data)
    assert "without the adapter" not in caplog.text


@pytest.mark.stack
def test_grpo_takes_the_trained_adapter_as_the_reference(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = lora_fx.as_peft_model(adapted(LoraConfig(**EXACT)))
    options = {**trainer_options("sgd", None), "max_steps": 1, "logging_strategy": "steps"}
    options["per_device_train_batch_size"] = 4
    arguments = trl.GRPOConfig(
        str(tmp_path),
        bf16=False,
        logging_steps=1,
        num_generations=2,
        max_completion_length=4,
        beta=0.1,
        **options,
    )
    run = trl.GRPOTrainer(
        model,
        lambda completions, **_: [float(len(text)) for text in completions],
        arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}),
        processing_class=tokenizer(),
    )
    assert run.ref_model is None
    run.train()
    (divergence,) = [row["kl"] for row in run.state.log_history if "kl" in row]
    assert divergence == pytest.approx(0, abs=1e-6)
