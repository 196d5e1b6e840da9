"""The plan of a step on a mesh of GPUs: what four gloo processes hold and send, found without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn

from lora_fx import ConfigError, LoraConfig
from lora_fx.tools.cluster import Mesh, plan_step
from tests.stacks.tensor_parallel import run_rank
from tests.tools.cluster_tp_ranks import CONFIG, INPUTS, MESHES, model, work

RANKS = 4
# Live for a moment only, and not always at the same one.
_ABOUT = ("peak",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, work), nprocs=RANKS)
    return [torch.load(folder / f"work {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("text", MESHES)
def test_a_plan_is_what_processes_hold_and_send(text: str, measured: list[dict[str, Any]]) -> None:
    planned = dataclasses.asdict(plan_step(model(), CONFIG, Mesh.parse(text), INPUTS))
    for rank in measured:
        found = rank[text]
        for name, value in planned.items():
            if name in _ABOUT:
                assert value == pytest.approx(found[name], rel=0.01)
            else:
                assert value == found[name], name


def test_parts_of_layers_take_less_and_send_activations() -> None:
    one, two = (plan_step(model(), CONFIG, Mesh(tp=size), INPUTS) for size in (1, 2))
    assert one.weights / 2 <= two.weights < one.weights * 0.51
    assert one.adapters / 2 < two.adapters < one.adapters
    assert two.activations < one.activations
    assert one.traffic.total == 0
    assert two.traffic.reduce > 0


def test_a_mesh_is_read() -> None:
    assert Mesh.parse("replicate=2, fsdp=8,tp=4") == Mesh(2, 8, 4)
    assert Mesh.parse("fsdp=8,tp=4").size == 32
    assert str(Mesh(fsdp=8, tp=2)) == "fsdp 8 x tp 2"


@pytest.mark.parametrize(
    ("text", "words"),
    [("pp=2", "'pp=2' is no dimension"), ("tp=0", "no dimension"), ("tp=2,tp=2", "is there twice")],
)
def test_what_is_no_mesh_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Mesh.parse(text)


def test_a_model_without_a_plan_is_refused() -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="Sequential has no tp_plan"):
        plan_step(layers, LoraConfig(r=2), Mesh(tp=2), {"input": torch.ones(1, 8)})
    assert not torch.distributed.is_initialized()


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=4, which 3 does not divide"):
        plan_step(model(), CONFIG, Mesh(tp=3), INPUTS)
    uneven = model(intermediate_size=129)
    with pytest.raises(ConfigError, match="its 129 elements there do not divide by 2"):
        plan_step(uneven, CONFIG, Mesh(tp=2), INPUTS)
