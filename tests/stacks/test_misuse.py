"""Processes of one model that do not agree, or end: an error in every process, and none waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import lora_fx
from tests.algebra import randomize
from tests.stacks.meshes import config
from tests.stacks.misuse import RANKS, TIMEOUT, left_alone, misuse
from tests.stacks.models import llama
from tests.stacks.tensor_parallel import run_rank

# Several processes for each setup: minutes in all.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    for seed in range(RANKS):
        model = randomize(lora_fx.rewrite(llama().double(), config({})), 0.1 + 0.1 * seed)
        lora_fx.save_adapter(model, folder / f"{seed}")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, misuse), nprocs=RANKS)
    return [torch.load(folder / f"misuse {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("what", "site"),
    [
        ("another rank", "model.layers.0.self_attn.q_proj"),
        ("other layers", "model.layers.0.self_attn.v_proj"),
        ("another folder", "model.layers.0.self_attn.q_proj"),
        ("loaded again", "model.layers.0.self_attn.q_proj"),
        ("added later", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_another_adapter_is_refused_in_every_process(
    what: str, site: str, found: list[dict[str, str]]
) -> None:
    for rank in found:
        assert rank[what].startswith(f"ConfigError: {site}: the adapter ")
        assert "load the same folder" in rank[what]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("cut, other values", "model.layers.0.self_attn.q_proj.lora_A.default"),
        ("cut, other ranks", "model.layers.0.self_attn.q_proj.lora_A.default"),
        ("saved, other values", "model.layers.0.self_attn.q_proj.lora_A.default"),
        ("merged, other layers", "model.layers.0.self_attn.v_proj.lora_A.default"),
    ],
)
def test_what_was_another_adapter_before_it_was_cut_is_refused_at_its_first_use(
    what: str, name: str, found: list[dict[str, str]]
) -> None:
    for rank in found:
        assert rank[what].startswith(f"ConfigError: {name}: on rank 1 it was another one than on")


def test_what_is_the_same_passes_and_what_was_refused_is_gone(found: list[dict[str, str]]) -> None:
    for rank in found:
        assert rank["the same"] == rank["cut, written since"] == ""
        assert rank["adapters"] == "default"


@pytest.mark.parametrize("how", ["ended", "late", "elsewhere"])
def test_who_is_left_alone_is_told_so(how: str, tmp_path: Path) -> None:
    multiprocessing.spawn(left_alone, (str(tmp_path), how), nprocs=RANKS)
    for said, seconds in torch.load(tmp_path / f"{how}.pt").values():
        assert said.startswith("ProcessError: ")
        assert "rank 1 has ended, or has not called this" in said
        assert seconds < 4 * TIMEOUT
