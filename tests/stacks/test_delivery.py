"""lora_fx.sync_callback: trainers deliver each version of an adapter to a server while they run."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lora_fx
from lora_fx import ConfigError, DeliveryError, LoraConfig
from tests.lora_server import served
from tests.stacks.models import adapted, llama
from tests.stacks.trainers import DATA, STEPS, tokenizer, trainer_options

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], lora_dropout=0.5)
TEXTS = ["w1 w5 w9 w4", "w7 w2 w30"]
DOWN = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    with served(folder) as url:
        yield url


def steps(callback: Any) -> list[str]:
    assert all(receipt.applied for receipt in callback.deliveries)
    return [receipt.version for receipt in callback.deliveries]


def run_trainer(model: Any, folder: Path, callback: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(str(folder / "run"), **trainer_options("sgd", None), **options)
    trainer = Trainer(
        model, arguments, train_dataset=DATA, callbacks=[callback], processing_class=tokenizer()
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("as_peft", [False, True], ids=["", "as a PeftModel"])
def test_each_version_of_the_trainer_arrives(address: str, as_peft: bool, tmp_path: Path) -> None:
    model = adapted(CONFIG)
    callback = lora_fx.sync_callback(address, every=3, probe=TEXTS, name=f"trainer-{as_peft}")
    run_trainer(lora_fx.as_peft_model(model) if as_peft else model, tmp_path, callback)
    assert steps(callback) == ["step 3", f"step {STEPS}"]


def test_a_delivery_changes_nothing_of_the_training(address: str, tmp_path: Path) -> None:
    losses = []
    for every in (1, 100):
        model = adapted(CONFIG)
        callback = lora_fx.sync_callback(address, every=every, probe=TEXTS, name=f"every-{every}")
        run_trainer(model, tmp_path, callback)
        losses.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_training_goes_on_without_a_server_if_it_may(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match=r"default' \(step 1\) was not delivered"):
        run_trainer(adapted(CONFIG), tmp_path, lora_fx.sync_callback(DOWN, every=1, probe=TEXTS))
    callback = lora_fx.sync_callback(DOWN, every=2, probe=TEXTS, on_failure="warn")
    trainer = run_trainer(adapted(CONFIG), tmp_path, callback)
    assert trainer.state.global_step == STEPS
    assert [error.reason for error in callback.failures] == ["no answer"] * 2
    assert not callback.deliveries


def test_callbacks_are_copied_and_pickled() -> None:
    callback = lora_fx.sync_callback(lora_fx.VllmServer(DOWN), every=7, probe=TEXTS, name="policy")
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is type(callback)
        assert (other.every, other.options) == (7, callback.options)
        assert other.target.address == f"{DOWN}/v1"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"on_inconclusive": None}, "on_inconclusive=None"),
        ({"target": "localhost"}, "no address"),
    ],
)
def test_arguments_are_checked_before_training(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lora_fx.sync_callback(**{"target": DOWN, "probe": TEXTS, **options})


def test_a_model_or_a_probe_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for model, probe, says in (
        (llama(), TEXTS, "no rewritten model"),
        (adapted(CONFIG), [3.5], "probe= is a text"),
        (adapted(CONFIG), [""], "without tokens"),
    ):
        callback = lora_fx.sync_callback(DOWN, every=1000, probe=probe)
        with pytest.raises(ConfigError, match=says):
            run_trainer(model, tmp_path, callback)


# --- TRL ------------------------------------------------------------------------------------------


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.mark.stack
@pytest.mark.parametrize("as_peft", [False, True], ids=["", "as a PeftModel"])
def test_each_version_of_grpo_arrives(address: str, as_peft: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    # Its fused loss reads the weight of the head, over which dropout is refused.
    model = adapted(dataclasses.replace(CONFIG, lora_dropout=0.0))
    options = {**trainer_options("sgd", None), "per_device_train_batch_size": 4}
    options["learning_rate"] = 1.0
    arguments = trl.GRPOConfig(
        str(tmp_path), bf16=False, num_generations=4, max_completion_length=8, **options
    )
    callback = lora_fx.sync_callback(address, every=1, probe=TEXTS, name=f"grpo-{as_peft}")
    trl.GRPOTrainer(
        lora_fx.as_peft_model(model) if as_peft else model,
        reward,
        arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"] * 8}),
        processing_class=tokenizer(),
        callbacks=[callback],
    ).train()
    assert steps(callback) == [f"step {step}" for step in range(1, STEPS + 1)]


@pytest.mark.stack
def test_each_version_of_online_dpo_arrives(address: str, tmp_path: Path) -> None:
    online = pytest.importorskip("trl.experimental.online_dpo")
    from datasets import Dataset

    model = lora_fx.as_peft_model(adapted(CONFIG))
    options = {**trainer_options("sgd", None), "learning_rate": 1.0}
    arguments = online.OnlineDPOConfig(str(tmp_path), bf16=False, max_new_tokens=8, **options)
    callback = lora_fx.sync_callback(address, every=2, probe=TEXTS, name="online-dpo")
    online.OnlineDPOTrainer(
        model,
        None,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"] * 8}),
        processing_class=tokenizer(),
        callbacks=[callback],
    ).train()
    assert steps(callback) == ["step 2", "step 4"]
