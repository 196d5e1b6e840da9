"""FSDP2, HSDP and FSDP2 over tensor parallelism, in four processes, and adapters that are added then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

import lora_fx
from tests.numerics import assert_close, assert_same_bits
from tests.stacks.features import features_in, shown
from tests.stacks.meshes import IDS, LATE, RANKS, WAYS, alone, combined, config, mean_step, work
from tests.stacks.tensor_parallel import run_rank

# Several processes for each setup: minutes in all.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, work), nprocs=RANKS)
    return [torch.load(folder / f"work {RANKS} {rank}.pt") for rank in range(RANKS)]


def stack_of(way: str) -> str:
    return {"fsdp": "FSDP2", "hsdp": "HSDP", "fsdp x tp": "FSDP2 x TP"}[way.partition(",")[0]]


def check(found: list[dict[str, Any]], loss: torch.Tensor, gradients: dict[str, Any]) -> None:
    mean = torch.stack([rank["loss"] for rank in found]).mean()
    assert_close(mean, loss, 1e-6)
    for rank in found:
        assert rank["gradients"].keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.abs().max() > 0
            assert_close(rank["gradients"][key], gradient, 1e-6)


@pytest.mark.parametrize("way", shown(WAYS, stack_of, features_in))
def test_losses_and_gradients_are_those_of_one_process(
    way: str, found: list[dict[str, Any]]
) -> None:
    _, groups, options = WAYS[way]
    check([rank[way] for rank in found], *mean_step(alone(options), groups))


@pytest.mark.parametrize("way", shown(LATE, stack_of, lambda way: ("add later", "save", "switch")))
def test_an_adapter_that_is_added_later_is_trained_as_in_one_process(
    way: str, found: list[dict[str, Any]]
) -> None:
    _, groups, options = WAYS[way]
    model = alone(options)
    lora_fx.add_adapter(model, config({**options, "r": 3, "init_lora_weights": False}), "late")
    both = combined(model, options)
    lora_fx.set_adapter(model, "late")
    check([rank[way]["late"] for rank in found], *mean_step(model, groups))
    for rank in found:
        before, after = rank[way]["late"]["states"]
        assert_same_bits(before, lora_fx.adapter_state_dict(model, "late"))
        assert_same_bits(rank[way]["late"]["both"], both)
        assert_same_bits(after, found[0][way]["late"]["states"][1])
        assert not torch.equal(*(next(iter(state.values())) for state in (before, after)))


@pytest.mark.parametrize("way", shown(WAYS, stack_of, lambda way: ("merge",)))
def test_a_merge_is_that_of_one_process(way: str, found: list[dict[str, Any]]) -> None:
    model = lora_fx.merge(alone(WAYS[way][2]))
    for rank in found:
        state, logits = rank[way]["merged"]
        assert_same_bits(state, model.state_dict())
        assert_close(logits, model(IDS).logits, 1e-6)


@pytest.mark.parametrize("way", LATE)
def test_more_than_factors_is_refused_when_it_is_added_later(
    way: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        assert "ConfigError" in rank[way]["refused"]
        assert "before the model is sharded" in rank[way]["refused"]
