"""FSDP2: what it owns is changed by values, or refused, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.models import IDS, llama
from tests.stacks.sharding import ADAPTER, CASES, RANKS, base, build, drawn, run_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.feature("FSDP2", "switch")
@pytest.mark.parametrize("case", CASES)
def test_a_switch_is_that_of_one_process(case: str, found: list[dict[str, Any]]) -> None:
    model = build(case)
    on, off = model(IDS).logits, base(case)(IDS).logits
    assert not torch.equal(on, off)
    for rank in found:
        for name, output in rank[case]["outputs"].items():
            assert_close(output, on if name.startswith("on") else off)


@pytest.mark.feature("FSDP2", "save")
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_that_of_one_process(case: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert_same_bits(rank[case]["state"], lora_fx.adapter_state_dict(build(case)))


def test_units_stay_units(found: list[dict[str, Any]]) -> None:
    assert found[0]["branches in units"]["base"] == "FSDPLinear"


@pytest.mark.feature("FSDP2", "merge")
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_one_process_in_the_same_parts(
    case: str, found: list[dict[str, Any]]
) -> None:
    model = build(case)
    one = lora_fx.merge(model)
    logits = one(IDS).logits
    own = {name: p for name, p in model.named_parameters() if ADAPTER(name)}
    adapted = {name[: ADAPTER(name).start()] for name in own}
    largest = max(one.get_submodule(path).weight.nbytes for path in adapted)
    for rank in (rank["merged"][case] for rank in found):
        assert_same_bits(rank["state"], one.state_dict())
        assert rank["placements"] == rank["base"]
        assert rank["class"] == "LlamaForCausalLM"
        assert_close(rank["logits"], logits)
        trained = [name for name, p in one.named_parameters() if p.requires_grad]
        assert rank["trained"] == trained
        # One site at a time: its weight (and what a start has made of it), and its factors.
        weights = 2 if case == "pissa" else 1
        assert 0 < rank["most"] <= weights * largest + 4 * max(p.nbytes for p in own.values())
        assert all(kept <= part for kept, part in rank["held"].values())
        assert not torch.equal(rank["trained on"], rank["logits"])
        assert_same_bits(*rank["unchanged"])


def test_what_is_drawn_for_a_combination_is_one_in_all_processes(
    found: list[dict[str, Any]],
) -> None:
    model = build("plain")
    wanted = drawn(model, 0)
    for rank in found:
        assert_same_bits(rank["drawn"], wanted)


def test_new_parameters_and_copies_are_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["refused"]
        assert "ConfigError" in said["add_adapter"]
        assert "before the model is sharded" in said["add_adapter"]
        assert "MergeError: into is sharded by FSDP" in said["merge into a sharded model"]
        assert "CaptureError: the model is sharded by FSDP" in said["rewrite"]


def test_one_process_saves_what_all_have_gathered(folder: Path) -> None:
    again = lora_fx.load_adapter(llama(), folder / "saved")
    assert_close(again(IDS).logits, build("plain")(IDS).logits)
