"""Several adapters that one batch trains: per-adapter losses, optimizers, the Trainer."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.numerics import assert_close
from tests.zoo import tiny_llama

NAMES = ("maths", "code", "law")


def adapted(base: nn.Module, **config: Any) -> nn.Module:
    model = base
    for seed, name in enumerate(NAMES):
        settings = {"r": 2 + seed, "lora_alpha": 4 + seed, "seed": seed, **config}
        if seed:
            lora_fx.add_adapter(model, LoraConfig(**settings), name)
        else:
            model = lora_fx.rewrite(base, LoraConfig(**settings), adapter_name=name)
    lora_fx.set_adapter(model, NAMES, per_sample=True)
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()[0].double()


def tokens(rows: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 16, (rows, length), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- losses ------------------------------------------------------------------------------------------


def test_each_adapter_has_the_gradient_of_its_own_step() -> None:
    model, ids = adapted(llama()), ["code", "maths", None, "code"]
    batch = tokens(4)
    labels = batch.clone()
    labels[0, :4] = -100
    logits = model(batch, adapter_ids=ids).logits
    losses = lora_fx.adapter_losses(logits, labels, ids)
    assert list(losses) == ["code", "maths"]
    sum(losses.values()).backward()
    alone = copy.deepcopy(model)
    for name in losses:
        rows = [row for row, one in enumerate(ids) if one == name]
        lora_fx.set_adapter(alone, name)
        alone.zero_grad()
        loss = alone(batch[rows], labels=labels[rows]).loss
        loss.backward()
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-6)
        for key, one in trained(alone).items():
            torch.testing.assert_close(trained(model)[key], one, rtol=1e-4, atol=1e-6)
    assert not any(key.endswith(".law") for key in trained(model))


def test_losses_of_rows_and_of_tokens() -> None:
    ids, logits = ["a", "b", "a"], torch.randn(3, 5)
    labels = torch.tensor([1, -100, 4])
    losses = lora_fx.adapter_losses(logits, labels, ids, label_smoothing=0.1)
    wanted = F.cross_entropy(logits[[0, 2]], labels[[0, 2]], label_smoothing=0.1)
    assert_close(losses["a"], wanted)
    assert losses["b"].item() == 0
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    losses = lora_fx.adapter_losses(logits, labels, ids, shift=False)
    assert_close(losses["b"], F.cross_entropy(logits[1], labels[1]))
    halves = lora_fx.adapter_losses(logits, labels, ids, shift=False, counts={"a": 16, "b": 4})
    assert_close(2 * halves["a"], losses["a"])
    wide = lora_fx.adapter_losses(logits.double(), labels, ids, shift=False)
    expected = F.cross_entropy(logits[1].double(), labels[1])
    torch.testing.assert_close(wide["b"], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 1)])
def test_losses_of_no_label(shape: tuple[int, ...]) -> None:
    labels, logits = torch.zeros(shape).long(), torch.zeros(*shape, 5)
    losses = lora_fx.adapter_losses(logits, labels, ["a"] * shape[0])
    assert [loss.item() for loss in losses.values()] == [0.0] * bool(shape[0])


@pytest.mark.parametrize(
    ("logits", "labels", "ids", "message"),
    [
        ((3, 4, 5), torch.zeros(3, 3).long(), ["a"] * 3, "do not match logits"),
        ((3, 5), torch.zeros(3), ["a"] * 3, "no whole numbers"),
        ((3, 5), torch.zeros(3).long(), ["a"] * 2, r"2 sample\(s\), and the batch has 3"),
    ],
)
def test_losses_that_cannot_be(logits: Any, labels: Tensor, ids: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_fx.adapter_losses(torch.zeros(logits), labels, ids)


def test_an_optimizer_for_each() -> None:
    model = adapted(llama())
    optimizers = {
        name: torch.optim.AdamW(lora_fx.parameter_groups(model, 10.0**-place, adapter_name=name))
        for place, name in enumerate(NAMES, 2)
    }
    known = [id(p) for one in optimizers.values() for g in one.param_groups for p in g["params"]]
    assert sorted(known) == sorted(id(p) for p in lora_fx.trainable_parameters(model))
    frozen = lora_fx.parameter_groups(model, 1e-3, adapter_name="law", lora_fa=True)
    assert [group["name"] for group in frozen] == ["lora_B"]
    trains = {name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert {name.rpartition(".")[2] for name in trains} == {"maths", "code"}
    with pytest.raises(ConfigError, match="no adapter 'poems'"):
        lora_fx.parameter_groups(model, 1e-3, adapter_name="poems")


# --- the Trainer -------------------------------------------------------------------------------------


def dataset(names: list[str | None], seed: int = 0) -> list[dict[str, Any]]:
    rows = []
    for place, (row, name) in enumerate(zip(tokens(len(names), seed=seed), names, strict=True)):
        labels = row.clone()
        labels[: place % 3] = -100
        rows.append({"input_ids": row, "labels": labels, "adapter": name})
    return rows


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "optim": "adamw_torch",
        **more,
    }
    return TrainingArguments(str(folder), **settings)


# Two steps of two batches: law is in the second step alone, and shares batches with the others.
COLUMN = ["maths", "code", "code", None, "law", "maths", "law", "code"]


class _InOrder:
    """A Trainer that takes the rows as they are."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def by_hand(model: nn.Module, rows: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """Each adapter alone with its rows, a step of AdamW for every ``step`` rows in which it has some."""
    found = {}
    for name in NAMES:
        alone = copy.deepcopy(model)
        lora_fx.set_adapter(alone, name)
        groups = [*lora_fx.trainable_parameters(alone)]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        for start in range(0, len(rows), step):
            own = [row for row in rows[start : start + step] if row["adapter"] == name]
            if not own:
                continue
            batch = {key: torch.stack([row[key] for row in own]) for key in ("input_ids", "labels")}
            alone(**batch).loss.backward()
            nn.utils.clip_grad_norm_(groups, 0.05)
            optimizer.step()
            optimizer.zero_grad()
        found |= {
            key: p.detach()
            for key, p in alone.named_parameters()
            if key.endswith(f".{name}") and ".lora_" in key
        }
    return found


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_trainer_trains_each_as_alone(tmp_path: Path, checkpoints: bool) -> None:
    model, rows = adapted(llama()), dataset(COLUMN)
    wanted = by_hand(model, rows, step=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    more: dict[str, Any] = {"gradient_checkpointing": True} if checkpoints else {}

    trainer = Ordered(
        model,
        arguments(tmp_path, **more),
        data_collator=default_data_collator,
        train_dataset=rows,
        eval_dataset=rows[:3],
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-5)
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])
    first = trainer.state.log_history[0]
    assert {"loss_maths", "loss_code"} <= set(first)
    assert "loss_law" not in first
    assert first["loss"] == pytest.approx(first["loss_maths"] + first["loss_code"], abs=1e-3)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    assert {"eval_loss_maths", "eval_loss_code"} <= set(trainer.state.log_history[-1])
    lora_fx.save_adapter(model, tmp_path / "adapter", adapter_name="law")


def test_a_column_of_another_name(tmp_path: Path) -> None:
    rows = [{**row, "task": row.pop("adapter")} for row in dataset(["law", "code"])]
    model = adapted(llama())
    trainer = lora_fx.train_together(Trainer, "task")(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows
    )
    assert type(trainer) is lora_fx.train_together(Trainer, "task")
    trainer.train()
    assert trainer.state.log_history[0].keys() >= {"loss_law", "loss_code"}
    pickle.loads(pickle.dumps(trainer.data_collator))


def test_rows_without_an_adapter_train_nothing(tmp_path: Path) -> None:
    model = adapted(llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = dataset([None, None])
    lora_fx.train_together(Trainer)(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows
    ).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def classifier(**more: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=16, num_attention_heads=2, num_labels=3, **sizes, **more)
    return BertForSequenceClassification(config)


def translator() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=16, decoder_start_token_id=0, **sizes))


def test_other_models_have_their_own_losses(tmp_path: Path) -> None:
    for base, labels in (
        (classifier(), torch.tensor([0, 2, 1, 1])),
        (translator(), tokens(4, seed=3)),
    ):
        model = adapted(base.eval(), target_modules=["query", "value", "q", "v"])
        rows = [
            {"input_ids": row, "labels": label, "adapter": name}
            for row, label, name in zip(
                tokens(4), labels, ["law", "code", "law", None], strict=True
            )
        ]
        trainer = lora_fx.train_together(Trainer)(
            model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows
        )
        found = trainer.evaluate()
        total = 0.0
        for name in ("law", "code"):
            own = [row for row in rows if row["adapter"] == name]
            lora_fx.set_adapter(model, name)
            batch = {key: torch.stack([row[key] for row in own]) for key in ("input_ids", "labels")}
            total += model(**batch).loss.item()
            logged = trainer.state.log_history[-1][f"eval_loss_{name}"]
            assert logged == pytest.approx(model(**batch).loss.item(), rel=1e-4)
        assert found["eval_loss"] == pytest.approx(total, rel=1e-4)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    together = lora_fx.train_together(Trainer)
    model = adapted(llama())
    with pytest.raises(ConfigError, match="remove_unused_columns"):
        together(model, arguments(tmp_path, remove_unused_columns=True))
    with pytest.raises(ConfigError, match="override adapter_losses in a subclass"):
        together(model, arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    trainer = together(model, arguments(tmp_path), train_dataset=dataset(["law"]))
    lora_fx.set_adapter(model, ["law"], per_sample=True)
    with pytest.raises(ConfigError, match="make a new one"):
        trainer.train()
    lora_fx.set_adapter(model, "law")
    with pytest.raises(ConfigError, match="per_sample=True"):
        together(model, arguments(tmp_path))


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    together, model = lora_fx.train_together(Trainer), adapted(llama())
    for rows, message in (
        ([{"input_ids": tokens(1)[0], "labels": tokens(1)[0]}], "no column 'adapter'"),
        (dataset(["poems"]), "names the adapter 'poems'"),
        ([{"input_ids": tokens(1)[0], "adapter": "law"}], "no 'labels'"),
    ):
        trainer = together(model, arguments(tmp_path), train_dataset=rows)
        with pytest.raises(ConfigError, match=message):
            trainer.train()

    def packed(rows: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([row["input_ids"] for row in rows])[None]}

    trainer = together(
        model, arguments(tmp_path), packed, train_dataset=dataset(["law", "code", "law"])
    )
    with pytest.raises(ConfigError, match="no packing"):
        trainer.train()


def test_losses_that_are_not_known(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    config = MixtralConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    config.output_router_logits = True
    routed = adapted(MixtralForCausalLM(config), target_modules=["q_proj"])
    regression = adapted(classifier(problem_type="regression"), target_modules=["query"])
    for model, message in ((routed, "output_router_logits"), (regression, "ForSequence")):
        trainer = lora_fx.train_together(Trainer)(
            model, arguments(tmp_path), train_dataset=dataset(["law", "code"])
        )
        with pytest.raises(ConfigError, match=message):
            trainer.train()


# --- several processes -------------------------------------------------------------------------------


class Ordered(_InOrder, lora_fx.train_together(Trainer)):  # type: ignore[misc]
    """Of this module, so that another process finds it."""


def _train(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model = adapted(llama())
    more = {"gradient_accumulation_steps": 1, "ddp_backend": "gloo"}
    trainer = Ordered(
        model,
        arguments(Path(folder) / str(rank), **more),
        data_collator=default_data_collator,
        train_dataset=dataset(COLUMN),
    )
    trainer.train()
    logged = [one for one in trainer.state.log_history if "loss_maths" in one]
    if rank == 0:
        torch.save((model.state_dict(), logged), Path(folder) / "found.pt")
    # What holds the group has to go before it.
    del trainer, model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_processes_train_each_as_alone(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    # A step has the batches of both processes: law has rows in the second step alone.
    torch.multiprocessing.spawn(_train, (str(tmp_path), port), nprocs=2)
    state, logged = torch.load(tmp_path / "found.pt")
    for name, one in by_hand(adapted(llama()), dataset(COLUMN), step=4).items():
        torch.testing.assert_close(state[name], one, rtol=1e-4, atol=1e-5)
    assert len(logged) == 2
    assert ["loss_law" in one for one in logged] == [False, True]
