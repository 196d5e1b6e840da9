"""Context parallelism: each process has a part of every sequence, and the result is that of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from tests.numerics import assert_close
from tests.stacks.context_parallel import (
    CASES,
    GRAPHS,
    TRAINERS,
    VERBS,
    attention_step,
    base_loss,
    trained,
    training_step,
    work,
)
from tests.stacks.features import features_in, shown
from tests.stacks.tensor_parallel import run_rank

RANKS = (2, 4)
# The loss of transformers, and its gradient, are in fp32.
OF_LOSS = 1e-6

alone = cache(training_step)
base_alone = cache(base_loss)


def context_parallel(name: str) -> str:
    del name
    return "context parallel"


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} processes")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, Any]]:
    ranks: int = request.param
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), ranks, work), nprocs=ranks)
    return [torch.load(folder / f"work {ranks} {rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "FSDP2"])
@pytest.mark.parametrize("name", shown(CASES, context_parallel, features_in))
def test_losses_and_gradients_are_those_of_one_process(
    name: str, sharded: bool, results: list[dict[Any, Any]]
) -> None:
    loss, gradients = alone(name)
    for rank in results:
        assert_close(rank[name, sharded]["loss"], loss, OF_LOSS)
        assert rank[name, sharded]["gradients"].keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert gradient.abs().max() > 0
            assert_close(rank[name, sharded]["gradients"][key], gradient, OF_LOSS)


@pytest.mark.feature("context parallel", "switch")
@pytest.mark.parametrize("name", CASES)
def test_a_disabled_adapter_leaves_the_base(name: str, results: list[dict[Any, Any]]) -> None:
    for rank in results:
        assert_close(rank[name, False]["base"], base_alone(name), OF_LOSS)


@pytest.mark.feature("context parallel", "switch", "merge", "add later")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_code_that_is_generated_inside_calls_the_ring(
    graph: str, verb: str, results: list[dict[Any, Any]]
) -> None:
    loss, gradient = attention_step(graph, verb)
    for rank in results:
        assert_close(rank[graph, verb], (loss, gradient))


def test_a_model_that_is_rewritten_inside(results: list[dict[Any, Any]]) -> None:
    loss, gradients = alone("balanced")
    for rank in results:
        assert_close(rank["rewritten inside"][0], loss, OF_LOSS)
        assert_close(rank["rewritten inside"][1], gradients, OF_LOSS)


@pytest.mark.feature("context parallel", "train")
@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_trains_what_it_trains_in_one_process(
    name: str, results: list[dict[Any, Any]], tmp_path: Path
) -> None:
    losses, adapter = trained(TRAINERS[name], tmp_path)
    for rank in results:
        found: tuple[list[float], dict[str, Tensor]] = rank["Trainer", name]
        assert found[0] == pytest.approx(losses, rel=OF_LOSS)
        assert_close(found[1], adapter, 1e-5)


def test_pytorch_has_no_ring_for_the_cpu(results: list[dict[Any, Any]]) -> None:
    """Once it has one, the processes need not register it."""
    for rank in results:
        assert "flash_attention_for_cpu" in rank["without kernel"]
        assert "does not have a sharding strategy" in rank["without kernel"]
