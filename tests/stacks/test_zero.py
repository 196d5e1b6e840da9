"""DeepSpeed's ZeRO-3: what it partitions trains, is saved and merged as in one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import LlamaForCausalLM

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.features import shown
from tests.stacks.models import llama
from tests.stacks.zero import (
    IDS,
    RANKS,
    ROWS,
    WAYS,
    build,
    run_rank,
    samples,
    train,
    train_rank,
)

pytestmark = pytest.mark.stack
STACK = "DeepSpeed ZeRO-3"


def spawn(run: Any, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run, (str(folder), port), nprocs=RANKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def alone(case: str) -> tuple[Any, list[torch.Tensor], dict[str, torch.Tensor]]:
    """One process, a step further, with the mean of all gradients."""
    model = build(case)
    losses = []
    for rank in range(RANKS):
        loss = model(samples(rank), labels=samples(rank)).loss
        (loss / RANKS).backward()
        losses.append(loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return model.eval(), losses, gradients


def features(name: str) -> list[str]:
    found = ["train", "save", "switch", "merge"]
    found += ["DoRA"] if name.endswith("DoRA") else []
    return found if name.startswith("before") else [*found, "start in parts"]


NAMES = [f"{way} {case}" for way, cases in WAYS.items() for case in cases]


@pytest.mark.parametrize("name", shown(NAMES, lambda _: STACK, features))
def test_a_step_is_that_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    case = name.partition(" ")[2]
    model, losses, gradients = alone(case)
    wanted = lora_fx.adapter_state_dict(model)
    on = model(IDS).logits
    with lora_fx.disable_adapter(model):
        off = model(IDS).logits
    merged = lora_fx.merge(model).state_dict()
    for rank, loss in zip(found, losses, strict=True):
        got = rank[name]
        assert got["empty"]
        assert_close(got["start"], lora_fx.adapter_state_dict(build(case)))
        assert_close(got["loss"], loss)
        assert got["gradients"].keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert_close(got["gradients"][key], gradient)
        assert_close(got["state"], wanted)
        for key in ("on", "on again", *(["merged, run"] if case == "plain" else [])):
            assert_close(got[key], on)
        assert_close(got["off"], off)
        assert_same_bits(got["loaded"], got["start"])
        assert got["merged, empty"]
        for values in (got["merged"], got["merged into"], got["merged in fp64"]):
            for key, value in values.items():
                assert_close(value, merged[key], 1e-6)
        assert {value.dtype for value in got["merged in fp64"].values()} == {torch.float64}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("before")])
def test_the_base_is_as_it_was(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert_same_bits(rank[name]["base"], dict(llama().named_parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_has_whole_tensors(name: str, folder: Path, found: list[dict[str, Any]]) -> None:
    stored = load_file(folder / name / "adapter_model.safetensors")
    assert all(value.numel() for value in stored.values())
    again = lora_fx.load_adapter(llama(), folder / name)
    assert_close(again(IDS).logits, found[0][name]["on"])
    if name == "before plain":
        for rank in found:
            assert_close(rank["loaded"], found[0][name]["on"])


@pytest.mark.feature(STACK, "add later", refused=True)
@pytest.mark.parametrize("name", NAMES)
def test_what_needs_whole_weights_is_refused(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank[name]["said"]
        assert said["export"].startswith("ExportError")
        assert "save the adapter on every rank" in said["export"]
        assert said["add"].startswith("ConfigError")
        assert "before the model is sharded" in said["add"]
        assert "would write it empty" in said["save_pretrained"]
        assert said["check"].startswith("CaptureError")
        assert "check the adapter on a model that is whole" in said["check"]


def test_a_partitioned_base_that_no_engine_runs(found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["unused"]
        assert said["adapters"] == "default more"
        assert "16x16" in said["plan"]  # the true shape of a weight
        assert said["example inputs"].startswith("CaptureError")
        assert "leave them out" in said["example inputs"]
        for verb, error in (("export", "ExportError"), ("quantize", "QuantizationError")):
            assert said[verb].startswith(error)
            assert "is partitioned by ZeRO-3" in said[verb]


def test_a_dense_model_of_that_process_is_rewritten_as_ever(found: list[dict[str, Any]]) -> None:
    model = build("plain").eval()
    for rank in found:
        assert rank["built in"]
        assert rank["replaced"]
        assert_close(rank["dense"], model(IDS).logits)
        assert_close(rank["dense, merged"], lora_fx.merge(model)(IDS).logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("trainer")
    llama().save_pretrained(folder / "origin")
    spawn(train_rank, folder)
    return folder


@pytest.mark.feature(STACK, "train", "save", "resume, bit-equal", "start in parts")
@pytest.mark.parametrize("name", ["whole", "bare"])
def test_the_trainer_trains_what_one_process_trains(name: str, trained: Path) -> None:
    losses, model = train(llama, trained / f"{name} alone", [], len(ROWS))
    wanted = lora_fx.adapter_state_dict(model)
    assert losses[-1] < losses[0] - 0.01
    for rank in range(RANKS):
        found = torch.load(trained / f"{rank}.pt")
        assert found["partitioned"]
        again = found["resumed" if name == "whole" else f"{name}, resumed"]
        assert_close(torch.tensor(found[name]["losses"]), torch.tensor(losses))
        assert_close(found[name]["state"], wanted)
        assert_same_bits(again["state"], found[name]["state"])
        assert again["losses"] == found[name]["losses"]
    model.eval()
    folders = [trained / f"{name} callback" / "last"]
    checkpoint = trained / name / "checkpoint-4"
    if name == "whole":
        folders.append(checkpoint)
    else:
        assert not (checkpoint / "adapter_model.safetensors").exists()
    for folder in folders:
        base = LlamaForCausalLM.from_pretrained(trained / "origin")
        assert_close(lora_fx.load_adapter(base, folder).eval()(IDS).logits, model(IDS).logits)
