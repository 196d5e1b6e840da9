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
from tests.stacks.sharding import CASES, RANKS, build, run_rank


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
    on, off = model(IDS).logits, llama()(IDS).logits
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


@pytest.mark.feature("FSDP2", "merge", refused=True)
def test_new_parameters_and_copies_are_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["refused"]
        for verb in ("add_adapter", "add_weighted_adapter"):
            assert "ConfigError" in said[verb]
            assert "before the model is sharded" in said[verb]
        for verb in ("merge", "rewrite"):
            assert "CaptureError: the model is sharded by FSDP" in said[verb]


def test_one_process_saves_what_all_have_gathered(folder: Path) -> None:
    again = lora_fx.load_adapter(llama(), folder / "saved")
    assert_close(again(IDS).logits, build("plain")(IDS).logits)
