"""DeepSpeed's ZeRO-3: what it partitions trains and is saved as in one process; the rest is refused."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.features import shown
from tests.stacks.models import llama
from tests.stacks.zero import CASES, IDS, RANKS, build, run_rank, samples

pytestmark = pytest.mark.stack
STACK = "DeepSpeed ZeRO-3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (str(folder), port), nprocs=RANKS)
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


def features(case: str) -> list[str]:
    return ["train", "save", "switch", *(["DoRA"] if case == "DoRA" else [])]


@pytest.mark.parametrize("case", shown(CASES, lambda _: STACK, features))
def test_a_step_is_that_of_one_process(case: str, found: list[dict[str, Any]]) -> None:
    model, losses, gradients = alone(case)
    wanted = lora_fx.adapter_state_dict(model)
    on = model(IDS).logits
    with lora_fx.disable_adapter(model):
        off = model(IDS).logits
    for rank, loss in zip(found, losses, strict=True):
        got = rank[case]
        assert got["empty"]
        assert_same_bits(got["start"], lora_fx.adapter_state_dict(build(case)))
        assert_close(got["loss"], loss)
        assert got["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(got["gradients"][name], gradient)
        for name, value in wanted.items():
            assert_close(got["state"][name], value)
        for name in ("on", "on again"):
            assert_close(got[name], on)
        assert_close(got["off"], off)
        assert_same_bits(got["loaded"], got["start"])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_has_whole_tensors(case: str, folder: Path, found: list[dict[str, Any]]) -> None:
    stored = load_file(folder / case / "adapter_model.safetensors")
    assert all(value.numel() for value in stored.values())
    again = lora_fx.load_adapter(llama(), folder / case)
    assert_close(again(IDS).logits, found[0][case]["on"])


@pytest.mark.feature(STACK, "merge", "add later", refused=True)
@pytest.mark.parametrize("case", CASES)
def test_what_needs_whole_weights_is_refused(case: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank[case]["said"]
        assert said["merge"].startswith("MergeError")
        assert said["merge of all, gathered"].startswith("MergeError")
        assert said["export"].startswith(("CaptureError", "ExportError", "MergeError"))
        assert said["add"].startswith("ConfigError")
        for verb in ("merge", "merge of all, gathered", "export"):
            assert "save the adapter on every rank" in said[verb], verb
        assert "before the model is sharded" in said["add"]
        assert "would write it empty" in said["save_pretrained"]


def test_a_base_that_is_partitioned_before_the_rewrite_is_refused(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        for words in rank["within"].values():
            assert words.startswith("CaptureError")
            assert "rewrite it before deepspeed.initialize" in words


def test_a_dense_model_of_that_process_is_rewritten_as_ever(found: list[dict[str, Any]]) -> None:
    model = build("plain").eval()
    for rank in found:
        assert rank["built in"]
        assert rank["replaced"]
        assert_close(rank["dense"], model(IDS).logits)
        assert_close(rank["dense, merged"], lora_fx.merge(model)(IDS).logits)
