"""The stacks that train a causal language model, each behind one function, so that all get the same tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader

import lora_fx
from tests.stacks.models import IDS

__all__ = ["on_stacks", "tokenizer", "train", "trainer_options"]

STEPS = 4
DATA = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]

# Trains a model for some steps, with checkpoints of activations ("reentrant" or "non-reentrant") or without,
# by SGD or AdamW; writes a checkpoint after two steps into the folder, and continues from `resume`.
Train = Callable[..., None]


def optimizer_for(model: Any, name: str) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kinds[name](trained, lr=1e-2)


def checkpoint_activations(model: Any, how: str | None) -> None:
    if how is not None:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()


def plain(
    model: Any, folder: Path, *, optimizer: str, activations: str | None, resume: bool
) -> None:
    checkpoint_activations(model, activations)
    stepper = optimizer_for(model, optimizer)
    first, model = 0, model.train()
    if resume:
        state = torch.load(folder / "half.pt")
        lora_fx.load_adapter_state_dict(model, state["adapter"])
        stepper.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        first = state["step"]
    for step in range(first, STEPS):
        model(IDS, labels=IDS).loss.backward()
        stepper.step()
        stepper.zero_grad()
        if step == 1 and not resume:
            state = {"optimizer": stepper.state_dict(), "random": torch.get_rng_state(), "step": 2}
            if isinstance(model, PeftModel):
                continue
            torch.save({**state, "adapter": lora_fx.adapter_state_dict(model)}, folder / "half.pt")


def accelerate(
    model: Any, folder: Path, *, optimizer: str, activations: str | None, resume: bool
) -> None:
    import accelerate

    checkpoint_activations(model, activations)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = DataLoader(DATA, batch_size=2)
    wrapped, stepper, batches = accelerator.prepare(
        model.train(), optimizer_for(model, optimizer), loader
    )
    batches, first = iter(batches), 0
    if resume:
        # Seeds come back last: to begin with the batches draws from them, too.
        first = 2
        for _ in range(first):
            next(batches)
        accelerator.load_state(str(folder / "half"))
    for step in range(first, STEPS):
        accelerator.backward(wrapped(**next(batches)).loss)
        stepper.step()
        stepper.zero_grad()
        if step == 1 and not resume:
            accelerator.save_state(str(folder / "half"))


def trainer_options(optimizer: str, activations: str | None) -> dict[str, Any]:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": optimizer,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "gradient_checkpointing": activations is not None,
    }
    if activations is not None:
        reentrant = activations == "reentrant"
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    return options


def trainer(
    model: Any, folder: Path, *, optimizer: str, activations: str | None, resume: bool
) -> None:
    from transformers import Trainer, TrainingArguments

    if activations == "reentrant":
        model.enable_input_require_grads()
    arguments = TrainingArguments(str(folder), **trainer_options(optimizer, activations))
    run = Trainer(model, arguments, train_dataset=DATA)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)


def tokenizer() -> Any:
    """One of 64 words, which spaces separate."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w62", eos_token="w63")


def trl(model: Any, folder: Path, *, optimizer: str, activations: str | None, resume: bool) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if activations == "reentrant":
        model.enable_input_require_grads()
    arguments = SFTConfig(str(folder), bf16=False, **trainer_options(optimizer, activations))
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in DATA])
    run = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)


def lightning(
    model: Any, folder: Path, *, optimizer: str, activations: str | None, resume: bool
) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seeds = model, None

        # Lightning saves no states of generators by itself.
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seeds"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seeds = checkpoint["seeds"]

        def on_train_batch_start(self, batch: Any, _: int) -> None:
            if self.seeds is not None:
                torch.set_rng_state(self.seeds)
                self.seeds = None

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_for(self.model, optimizer)

    checkpoint_activations(model, activations)
    saves = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="half-{step}", every_n_train_steps=2, save_top_k=-1
    )
    run = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        callbacks=[saves],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.train()  # Lightning leaves the mode as it is
    half = str(folder / "half-step=2.ckpt") if resume else None
    run.fit(Module(), DataLoader(DATA, batch_size=2), ckpt_path=half)


# The function, and what has to be installed for it.
STACKS: dict[str, tuple[Train, str]] = {
    "plain loop": (plain, "torch"),
    "Trainer": (trainer, "transformers"),
    "accelerate": (accelerate, "accelerate"),
    "TRL SFT": (trl, "trl"),
    "Lightning": (lightning, "lightning"),
}
IN_NO_EXTRA = {"trl", "lightning"}


def on_stacks(feature: str, *more: Any) -> pytest.MarkDecorator:
    """Runs a test on each of them, as what docs/integrations.md says about a feature."""
    cases = []
    for name, (_, package) in STACKS.items():
        marks = [pytest.mark.feature(name, feature), *more]
        if package in IN_NO_EXTRA:
            marks.append(pytest.mark.stack)
        cases.append(pytest.param(name, id=name, marks=marks))
    return pytest.mark.parametrize("stack", cases)


def train(stack: str, model: Any, folder: Path, **options: Any) -> Any:
    """Trains it there, or skips the test where the library is missing."""
    function, package = STACKS[stack]
    pytest.importorskip(package)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"optimizer": "sgd", "activations": None, "resume": False}
    with contextlib.chdir(folder):
        function(model, folder, **{**settings, **options})
    if accelerate := sys.modules.get("accelerate"):
        # One state for the whole process: another test asks for another precision.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return model
