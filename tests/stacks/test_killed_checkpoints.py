"""A process that is killed in save_pretrained, or while the Trainer saves, leaves what was there."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import lora_fx
from lora_fx import LoraConfig
from lora_fx.files import current
from tests.algebra import randomize
from tests.kills import killed, torn
from tests.numerics import assert_same_bits
from tests.stacks.models import IDS, adapted, llama
from tests.stacks.trainers import DATA, trainer_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked"),
]
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """A base that was saved somewhere."""
    llama().save_pretrained(tmp_path / "origin")
    return LlamaForCausalLM.from_pretrained(tmp_path / "origin").eval()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], value) for name, value in wanted.items()
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: one.detach().clone() for name, one in named if one.requires_grad}


def check_saved(folder: Path, base: Any, old: Any, new: Any) -> None:
    """Both files are those of one of the models."""
    adapter = lora_fx.adapter_state_dict(lora_fx.load_adapter(base, folder))
    weights = safetensors.torch.load_file(current(folder / "model.safetensors"))
    assert any(
        same(adapter, lora_fx.adapter_state_dict(model)) and same(weights, trained(model))
        for model in (old, new)
    )
    assert not (folder / "config.json").exists()


def test_what_was_saved_is_whole(base: Any, tmp_path: Path) -> None:
    old = adapted(CONFIG, base)
    new = randomize(copy.deepcopy(old), std=0.7)
    folder, steps = tmp_path / "out", 0
    old.save_pretrained(folder)
    for steps in killed(lambda: new.save_pretrained(folder), folder):  # noqa: B007
        check_saved(folder, base, old, new)
        shutil.rmtree(folder)
        old.save_pretrained(folder)
    assert steps > 20


def test_the_next_save_ends_what_a_killed_one_has_begun(base: Any, tmp_path: Path) -> None:
    old = adapted(CONFIG, base)
    new = randomize(copy.deepcopy(old), std=0.7)
    folder = tmp_path / "out"
    old.save_pretrained(folder)
    for _ in killed(lambda: new.save_pretrained(folder), folder, every=3):
        left = [path for path in folder.iterdir() if path.name.startswith(".")]
        for path in left:
            os.utime(path, (0, 0))
        lora_fx.save_adapter(old, folder, force=True)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        # What was complete went to its place before.
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        assert any(same(weights, trained(model)) for model in (old, new))
        old.save_pretrained(folder)


@pytest.mark.parametrize("number", range(3), ids=["trained", "base", "adapter"])
def test_no_file_of_tensors_is_torn(number: int, tmp_path: Path) -> None:
    """Also with a base that was loaded from nowhere, which is in the folder."""
    base = llama()
    old = adapted(CONFIG, base)
    new = randomize(copy.deepcopy(old), std=0.7)
    folder = tmp_path / "out"
    old.save_pretrained(folder)
    torn(lambda: new.save_pretrained(folder), number)
    check_saved(folder, base, old, new)
    there = LlamaForCausalLM.from_pretrained(folder / "base")
    assert_same_bits(there.state_dict(), base.state_dict())
    again = LlamaForCausalLM.from_pretrained(folder).eval()
    logits = [one.eval()(IDS).logits for one in (old, new)]
    assert any(torch.allclose(again(IDS).logits, one, atol=1e-5) for one in logits)


def run(base: Any, folder: Path, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    model = lora_fx.rewrite(base, CONFIG)
    arguments = TrainingArguments(str(folder / "run"), **trainer_options("adamw_torch", None))
    callback = lora_fx.trainer_callback(folder / "kept")
    trainer = Trainer(model, arguments, train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


@pytest.mark.feature("Trainer", "resume, bit-equal")
def test_the_trainer_goes_on_from_the_checkpoint_before(base: Any, tmp_path: Path) -> None:
    whole = run(base, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    folder = tmp_path / "killed"
    last, before = folder / "run" / "checkpoint-4", folder / "run" / "checkpoint-2"
    saved = lora_fx.adapter_state_dict(lora_fx.load_adapter(base, before))
    states = [saved, lora_fx.adapter_state_dict(whole)]
    kills = 0
    shutil.rmtree(last)
    lora_fx.save_adapter(lora_fx.load_adapter(base, before), folder / "kept" / "last", force=True)
    for _ in killed(lambda: run(base, folder, before), folder, every=11, first=3):
        assert same(lora_fx.adapter_state_dict(lora_fx.load_adapter(base, before)), saved)
        kept = lora_fx.load_adapter(base, folder / "kept" / "last")
        assert any(same(lora_fx.adapter_state_dict(kept), one) for one in states)
        shutil.rmtree(last, ignore_errors=True)
        kills += 1
    assert kills > 3
    assert_same_bits(trained(run(base, folder, before)), trained(whole))
