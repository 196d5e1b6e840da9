"""lora_fx.peft, PEFT's names over lora-fx: what the scripts in examples/from_peft do not reach."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lora_fx
import lora_fx.peft
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, adapted, llama

THEIRS = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def wrapped(**options: Any) -> Any:
    return lora_fx.peft.get_peft_model(llama(), THEIRS, **options).eval()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- one model, two adapters on top of each other -------------------------------------------------


@pytest.mark.parametrize("of_plain", [True, False], ids=["plain", "as PeftModel"])
def test_peft_cannot_adapt_a_rewritten_model_once_more(of_plain: bool) -> None:
    model = adapted()
    target = model if of_plain else lora_fx.as_peft_model(model)
    names, before, expected = [*dict(model.named_modules())], state(model), model(IDS).logits
    with pytest.raises(ConfigError, match=r"adapters of lora-fx \(default\).*peft_config=None"):
        peft.get_peft_model(target, THEIRS)
    with pytest.raises(ConfigError, match=r"lora_fx\.add_adapter"):
        peft.inject_adapter_in_model(THEIRS, target, "other")
    assert [*dict(model.named_modules())] == names
    assert_same_bits(state(model), before)
    assert_same_bits(model(IDS).logits, expected)


def test_peft_adapts_the_base_and_what_was_merged() -> None:
    base = llama()
    model = adapted(base=base)
    for free in (base, lora_fx.merge(model)):
        assert not hasattr(free, "peft_config")
        assert isinstance(peft.get_peft_model(free, THEIRS), peft.PeftModel)


@pytest.mark.stack
def test_trl_refuses_a_configuration_for_a_rewritten_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.stacks.trainers import tokenizer

    data = Dataset.from_dict({"text": ["w1 w2"] * 4})
    arguments = trl.SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    options = {"args": arguments, "train_dataset": data, "processing_class": tokenizer()}
    with pytest.raises(ConfigError, match="peft_config=None"):
        trl.SFTTrainer(adapted(), peft_config=copy.deepcopy(THEIRS), **options)


def test_a_rewritten_model_says_its_configurations() -> None:
    model = adapted()
    lora_fx.add_adapter(model, LoraConfig(r=3, target_modules=["v_proj"]), "other")
    assert {name: config.r for name, config in model.peft_config.items()} == {
        "default": 2,
        "other": 3,
    }
    assert isinstance(model.peft_config["default"], peft.LoraConfig)
    assert not hasattr(model.model, "peft_config")
    model.model.peft_config = "of its own"
    assert model.model.peft_config == "of its own"


# --- get_peft_model -------------------------------------------------------------------------------


def test_every_verb_takes_what_it_returns(tmp_path: Path) -> None:
    model = wrapped()
    assert isinstance(model, lora_fx.peft.PeftModel)
    assert lora_fx.status(model).adapters
    assert lora_fx.adapter_names(model) == ("default",)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    read = lora_fx.load_adapter(llama(), tmp_path / "adapter")
    assert_close(read(IDS).logits, model(IDS).logits)
    assert_close(lora_fx.merge(model)(IDS).logits, model(IDS).logits)
    assert sum(p.numel() for p in lora_fx.trainable_parameters(model)) == 2 * 2 * (32 + 40)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"]), "other")
    lora_fx.set_adapter(model, "other")
    assert model.active_adapter == "other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_base_in_half_precision(dtype: torch.dtype) -> None:
    for cast, expected in ((True, torch.float32), (False, dtype)):
        models = [
            made(llama().to(dtype), copy.deepcopy(THEIRS), autocast_adapter_dtype=cast)
            for made in (lora_fx.peft.get_peft_model, peft.get_peft_model)
        ]
        for model in models:
            trained = [p for p in model.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {expected}
            model(IDS, labels=IDS).loss.backward()
            assert {p.grad.dtype for p in trained} == {expected}


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="mixed=True"):
        wrapped(mixed=True)
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        lora_fx.peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM"))
    with pytest.raises(AttributeError, match=r"PromptTuningConfig.*docs/from-peft\.md"):
        _ = lora_fx.peft.PromptTuningConfig


def test_the_revision_is_in_the_folder(tmp_path: Path) -> None:
    wrapped(revision="v2").save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).revision == "v2"


# --- merge_adapter --------------------------------------------------------------------------------


def test_merged_for_a_while(tmp_path: Path) -> None:
    model = wrapped()
    names, before = [name for name, _ in model.named_parameters()], model(IDS).logits
    model.merge_adapter(safe_merge=True)
    assert_close(model(IDS).logits, before)
    # What a library sends to an inference engine: the names of the base, and no factors.
    plain = {f"base_model.model.{name}" for name, _ in llama().named_parameters()}
    assert {name for name, _ in model.named_parameters()} == plain
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\)"):
        model(IDS, adapter_names=["default"] * 2)
    model.save_pretrained(tmp_path)
    assert_close(peft.PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, before)
    model.unmerge_adapter()
    assert [name for name, _ in model.named_parameters()] == names
    assert_same_bits(model(IDS).logits, before)


def test_a_bar_says_how_far_a_merge_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped()
    model.merge_and_unload()
    assert "weight" not in capsys.readouterr().err
    model.merge_and_unload(progressbar=True)
    assert "4/4" in capsys.readouterr().err
    lora_fx.merge(model.get_base_model(), progress=True)
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().err


# --- AutoPeftModel… -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora_fx.peft.get_peft_model(base, THEIRS).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_with_its_base_in_one_call(saved: Path) -> None:
    expected = peft.PeftModel.from_pretrained(llama(), saved)(IDS).logits
    model = lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(saved)
    assert_close(model(IDS).logits, expected)
    assert not [p for p in model.parameters() if p.requires_grad]
    by_name = lora_fx.peft.AutoPeftModel.from_pretrained(saved, is_trainable=True)
    assert [p for p in by_name.parameters() if p.requires_grad]
    assert type(by_name.get_base_model()).__name__ == "LlamaForCausalLM"
    half = lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_folder_imports_no_code_that_it_names(saved: Path) -> None:
    named = {"base_model_class": "Path", "parent_library": "pathlib"}
    with pytest.raises(ConfigError, match=r"which class of transformers.*PeftModel\.from_pretr"):
        lora_fx.peft.AutoPeftModel.from_pretrained(changed(saved, auto_mapping=named))


def test_a_folder_without_a_base_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="does not name its base"):
        lora_fx.peft.AutoPeftModelForCausalLM.from_pretrained(
            changed(saved, base_model_name_or_path=None)
        )
