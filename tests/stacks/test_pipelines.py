"""Pipeline parallelism: stages that are cut from a rewritten model train as the whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close
from tests.stacks.models import llama
from tests.stacks.pipelines import IDS, OPTIONS, RANKS, SCHEDULES, build, pipelines, trained
from tests.stacks.tensor_parallel import run_rank

# Several processes for each setup: minutes in all.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, pipelines), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"pipelines {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.feature("pipeline stages", "train")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_stages_have_the_gradients_of_the_whole(
    name: str, kind: str, found: list[dict[str, Any]]
) -> None:
    whole = trained(build(name).train())
    parts = [rank[name, kind]["gradients"] for rank in found]
    assert all(parts)
    assert not parts[0].keys() & parts[1].keys()
    together = {**parts[0], **parts[1]}
    assert together.keys() == whole["gradients"].keys()
    for key, gradient in whole["gradients"].items():
        assert gradient.abs().max() > 0
        assert_close(together[key], gradient, 1e-6)
    assert_close(found[-1][name, kind]["losses"], whole["losses"], 1e-6)


@pytest.mark.feature("pipeline stages", "save")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_one_folder_has_what_all_stages_have_trained(
    name: str, kind: str, folder: Path, found: list[dict[str, Any]]
) -> None:
    del found
    whole = build(name).train()
    trained(whole)
    again = lora_fx.load_adapter(llama().double(), folder / f"{name} {kind}")
    assert_close(again(IDS).logits, whole.eval()(IDS).logits, 1e-6)
