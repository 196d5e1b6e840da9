"""TRL ends dropout by a walk over modules: log-probabilities in training are those in evaluation then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx import LoraConfig
from tests.numerics import assert_same_bits
from tests.stacks.models import IDS, adapted
from tests.stacks.trainers import tokenizer, trainer_options

CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)


def logits(model: Any, *, training: bool) -> Tensor:
    torch.manual_seed(0)
    out: Tensor = model.train(training)(IDS).logits
    return out


@pytest.mark.stack
def test_the_walk_of_trl_reaches_adapters() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = adapted(CONFIG)
    expected = logits(model, training=False)
    assert not torch.equal(logits(model, training=True), expected)
    utils.disable_dropout_in_model(model)
    assert_same_bits(logits(model, training=True), expected)


@pytest.mark.stack
@pytest.mark.feature("TRL DPO", "train")
def test_dpo_compares_with_a_reference_without_dropout(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = adapted(CONFIG)
    rows = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}] * 8
    arguments = trl.DPOConfig(
        str(tmp_path),
        bf16=False,
        **{**trainer_options("sgd", None), "max_steps": 1, "logging_strategy": "steps"},
        logging_steps=1,
    )
    assert arguments.disable_dropout
    run = trl.DPOTrainer(
        model,
        lora_fx.reference(model),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    run.train()
    # The first step compares equal models: log σ(0), and no margin.
    (first,) = [one for one in run.state.log_history if "rewards/margins" in one]
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(float(torch.log(torch.tensor(2.0))), abs=1e-3)
    assert_same_bits(logits(model, training=True), logits(model, training=False))
