"""Callbacks write adapter folders at checkpoints: the last one, and the best."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_same_bits
from tests.stacks.models import adapted, llama
from tests.stacks.trainers import DATA, trainer_options

CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)


def state(model: nn.Module, adapter: str | None = None) -> dict[str, torch.Tensor]:
    found = lora_fx.adapter_state_dict(model, adapter)
    return {name: value.clone() for name, value in found.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return state(lora_fx.load_adapter(llama(), folder))


class Inside(nn.Module):
    """A module of the user, with the rewritten model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        return {"loss": self.inner(input_ids, labels=labels).loss}


def run_trainer(model: Any, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder / "run"), **{**trainer_options("sgd", None), "eval_steps": 1, **options}
    )
    trainer = Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.feature("Trainer", "save")
@pytest.mark.parametrize("inside", [False, True], ids=["", "in a module"])
def test_the_trainer_keeps_the_last_and_the_best(inside: bool, tmp_path: Path) -> None:
    model = adapted(CONFIG)
    seen: list[dict[str, torch.Tensor]] = []
    # The values of the evaluations, in order: the third is the best.
    losses = iter([3.0, 2.0, 1.0, 5.0])

    class Fixed(Trainer):
        def evaluate(self, *args: Any, **given: Any) -> dict[str, float]:
            seen.append(state(model))
            metrics = {"eval_loss": next(losses)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    arguments = TrainingArguments(
        str(tmp_path / "run"),
        **trainer_options("sgd", None),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
    )
    trained = Inside(model) if inside else model
    callback = lora_fx.trainer_callback(tmp_path / "kept")
    Fixed(
        trained, arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=[callback]
    ).train()
    assert_same_bits(stored(tmp_path / "kept" / "best"), seen[2])
    assert_same_bits(stored(tmp_path / "kept" / "last"), seen[3])
    assert not list((tmp_path / "kept").rglob(".*"))


def test_a_resumed_trainer_knows_the_best(tmp_path: Path) -> None:
    model, again = adapted(CONFIG, named_base(tmp_path)), adapted(CONFIG, named_base(tmp_path))
    options = {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_steps": 1}
    run_trainer(model, tmp_path, [], **options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    text = (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
    assert '"best_metric": ' in text
    # Nothing is better than what it was.
    lines = [
        '  "best_metric": -1.0,' if '"best_metric"' in line else line for line in text.splitlines()
    ]
    (checkpoint / "trainer_state.json").write_text("\n".join(lines), encoding="utf-8")
    callback = lora_fx.trainer_callback(tmp_path / "kept")
    arguments = TrainingArguments(
        str(tmp_path / "run"), **{**trainer_options("sgd", None), **options}
    )
    trainer = Trainer(
        again, arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert (tmp_path / "kept" / "last").is_dir()
    assert not (tmp_path / "kept" / "best").exists()


def named_base(folder: Path) -> Any:
    llama().save_pretrained(folder / "origin")
    return type(llama()).from_pretrained(folder / "origin")


def test_without_a_metric_there_is_no_best(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    run_trainer(model, tmp_path, [lora_fx.trainer_callback(tmp_path)], eval_strategy="steps")
    assert not (tmp_path / "best").exists()
    assert_same_bits(stored(tmp_path / "last"), state(model))


def test_each_adapter_is_written(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    lora_fx.add_adapter(model, CONFIG, "other")
    run_trainer(model, tmp_path, [lora_fx.trainer_callback(tmp_path)])
    for name, folder in (("default", "last"), ("other", "last/other")):
        assert_same_bits(stored(tmp_path / folder), state(model, name))


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    base = named_base(tmp_path)
    with pytest.raises(ConfigError, match="no rewritten model in this LlamaForCausalLM"):
        run_trainer(base, tmp_path, [lora_fx.trainer_callback(tmp_path)])


def test_they_are_copied_and_pickled(tmp_path: Path) -> None:
    callback = lora_fx.trainer_callback(tmp_path)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is type(callback)
        assert other.directory == tmp_path


# --- Lightning ------------------------------------------------------------------------------------


def lightning_module(model: nn.Module, losses: list[float] | None = None) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.scale = model, nn.Parameter(torch.ones(()))
            self.seen: list[dict[str, torch.Tensor]] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.scale * self.model(**batch).loss

        def validation_step(self, batch: Any, _: int) -> None:
            if losses is not None and not self.trainer.sanity_checking:
                self.seen.append(state(self.model))
                self.log("val_loss", losses[len(self.seen) - 1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [one for one in self.parameters() if one.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-2)

    model.train()  # Lightning leaves the mode as it is
    return Module()


def run_lightning(
    module: Any, folder: Path, callback: Any, resume: Path | None = None, **options: Any
) -> Any:
    import lightning

    saves = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="half-{step}", every_n_train_steps=2, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        callbacks=[saves, callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    validation = DataLoader(DATA[:2], batch_size=2) if options else None
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(DATA, batch_size=2), validation, ckpt_path=resume)
    return trainer


@pytest.mark.stack
@pytest.mark.feature("Lightning", "save")
def test_lightning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    module = lightning_module(adapted(CONFIG), [3.0, 1.0, 2.0, 5.0])
    callback = lora_fx.lightning_callback(tmp_path / "kept", monitor="val_loss")
    run_lightning(module, tmp_path, callback, val_check_interval=1)
    assert len(module.seen) == 4
    assert_same_bits(stored(tmp_path / "kept" / "best"), module.seen[1])
    assert_same_bits(stored(tmp_path / "kept" / "last"), module.seen[3])
    assert not list((tmp_path / "kept").rglob(".*"))


@pytest.mark.stack
@pytest.mark.feature("Lightning", "save")
def test_a_checkpoint_of_lightning_has_what_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    module = lightning_module(adapted(CONFIG))
    run_lightning(module, tmp_path, lora_fx.lightning_callback(tmp_path / "kept"))
    found = torch.load(tmp_path / "half-step=4.ckpt", weights_only=False)["state_dict"]
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    assert_same_bits(found, {name: one.detach() for name, one in trained.items()})
    assert not module._load_state_dict_post_hooks


@pytest.mark.stack
@pytest.mark.feature("Lightning", "resume, bit-equal")
def test_a_run_of_lightning_goes_on_from_it(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    model = adapted(CONFIG)
    module, start = lightning_module(model), lightning_module(copy.deepcopy(model))
    run_lightning(module, tmp_path, lora_fx.lightning_callback(tmp_path / "kept"))
    assert start.strict_loading
    again = lora_fx.lightning_callback(tmp_path / "again")
    run_lightning(start, tmp_path / "more", again, resume=tmp_path / "half-step=2.ckpt")
    assert_same_bits(start.state_dict(), module.state_dict())
    assert_same_bits(stored(tmp_path / "again" / "last"), stored(tmp_path / "kept" / "last"))


@pytest.mark.stack
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    module = lightning_module(adapted(CONFIG))
    run_lightning(module, tmp_path, lora_fx.lightning_callback(tmp_path / "kept"))
    other = lightning_module(adapted(LoraConfig(r=2, target_modules=["q_proj", "up_proj"])))
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.lora_A"):
        run_lightning(
            other,
            tmp_path / "more",
            lora_fx.lightning_callback(tmp_path / "again"),
            resume=tmp_path / "half-step=2.ckpt",
        )


@pytest.mark.stack
def test_the_best_of_a_resumed_run_is_known(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    callback = lora_fx.lightning_callback(tmp_path / "kept", monitor="score", mode="max")
    callback.best = 0.75
    again = lora_fx.lightning_callback(tmp_path / "other", monitor="score", mode="max")
    assert again.state_key == callback.state_key
    again.load_state_dict(callback.state_dict())
    assert again.best == 0.75
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is type(callback)
        assert (other.best, other.monitor, other.mode) == (0.75, "score", "max")


@pytest.mark.stack
def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    module = lightning_module(adapted(CONFIG), [1.0] * 4)
    callback = lora_fx.lightning_callback(tmp_path / "kept", monitor="accuracy")
    with pytest.raises(ConfigError, match=r"'accuracy' is not logged; there are .*val_loss"):
        run_lightning(module, tmp_path, callback, val_check_interval=1)


def test_a_mode_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found 'least'; it is 'min' or 'max'"):
        lora_fx.lightning_callback(tmp_path, monitor="loss", mode="least")
