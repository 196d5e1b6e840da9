"""Checkpoints in parts that another number of processes loads, and models that begin on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.features import shown
from tests.stacks.meshes import config
from tests.stacks.models import IDS, llama
from tests.stacks.resharding import HOW, STARTS, load, load_and_train, save
from tests.stacks.tensor_parallel import run_rank

# Several processes for each setup: minutes in all.
pytestmark = pytest.mark.slow


def stack_of(how: str) -> str:
    return {"fsdp": "FSDP2", "tp": "tensor parallel"}[how]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), 2, save), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"save 2 {rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> list[dict[str, Any]]:
    multiprocessing.spawn(run_rank, (str(folder), 4, load), nprocs=4)
    return [torch.load(folder / f"load 4 {rank}.pt") for rank in range(4)]


@pytest.mark.feature("FSDP2", "start on meta")
@pytest.mark.parametrize("start", STARTS)
def test_a_start_after_the_meta_device_is_that_of_a_plain_rewrite(
    start: str, saved: list[dict[str, Any]]
) -> None:
    model = lora_fx.rewrite(llama().double(), config(STARTS[start]))
    for rank in saved:
        found = rank["meta"][start]
        assert_same_bits(found["state"], lora_fx.adapter_state_dict(model))
        assert_close(found["logits"], model(IDS).logits, 1e-6)
        assert "meta device" in found["refused"]


@pytest.mark.parametrize("how", shown(HOW, stack_of, lambda how: ("resume in other parts",)))
def test_four_processes_go_on_where_two_stopped(
    how: str, saved: list[dict[str, Any]], loaded: list[dict[str, Any]]
) -> None:
    for rank in loaded:
        assert_same_bits(rank[how]["loaded"], saved[0][how]["saved"])
        assert_close(rank[how]["trained"], saved[0][how]["trained"], 1e-6)


@pytest.mark.parametrize("how", shown(HOW, stack_of, lambda how: ("resume in other parts",)))
def test_one_process_goes_on_where_two_stopped(
    how: str, folder: Path, saved: list[dict[str, Any]]
) -> None:
    model = lora_fx.rewrite(llama().double(), config({}))
    found = load_and_train(model, folder / how, no_dist=True)
    assert_same_bits(found["loaded"], saved[0][how]["saved"])
    assert_close(found["trained"], saved[0][how]["trained"], 1e-6)
    changed = zip(found["loaded"].values(), found["trained"].values(), strict=True)
    assert not any(torch.equal(before, after) for before, after in changed)


@pytest.mark.parametrize("how", shown(HOW, stack_of, lambda how: ("save",)))
def test_the_adapter_folder_is_one_however_it_was_cut(
    how: str, folder: Path, saved: list[dict[str, Any]], loaded: list[dict[str, Any]]
) -> None:
    del saved, loaded
    names = [f"adapter {how} {rank}" for rank in range(2)]
    names += [f"adapter {how} of four {rank}" for rank in range(4)]
    files = [load_file(folder / name / "adapter_model.safetensors") for name in names]
    configs = {(folder / name / "adapter_config.json").read_text() for name in names}
    assert len(configs) == 1
    for file in files[1:]:
        assert_same_bits(file, files[0])
    model = lora_fx.load_adapter(llama().double(), folder / names[-1])
    state = lora_fx.adapter_state_dict(model)
    assert state.keys() == files[0].keys()
    assert_same_bits({key: state[key].to(value) for key, value in files[0].items()}, files[0])
