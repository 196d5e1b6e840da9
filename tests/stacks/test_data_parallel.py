"""DDP and FSDP2 in two processes: each kind of adapter trains, switches and merges as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.numerics import assert_close
from tests.stacks.data_parallel import CASES, RANKS, REWRITES, STACKS, alone, data_parallel
from tests.stacks.tensor_parallel import run_rank

# Several processes for each setup: minutes in all.
pytestmark = pytest.mark.slow

# Those that compute in fp32.
TOLERANCES = {"experts": 1e-5, "NF4": 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, data_parallel), nprocs=RANKS)
    return [torch.load(folder / f"data_parallel {RANKS} {rank}.pt") for rank in range(RANKS)]


def on_both(*features: str) -> pytest.MarkDecorator:
    """Runs a test on each stack and case, as what docs/integrations.md says about features."""
    cases = []
    for stack in STACKS:
        for case in CASES:
            named = features if case == "plain" else (case,)
            # A form of the rewrite is no feature of a stack.
            marks = () if case in REWRITES else pytest.mark.feature(stack, *named)
            cases.append(pytest.param(stack, case, id=f"{stack}, {case}", marks=marks))
    return pytest.mark.parametrize(("stack", "case"), cases)


@on_both("train")
def test_losses_and_gradients_are_those_of_one_process(
    stack: str, case: str, found: list[dict[Any, Any]]
) -> None:
    exact = alone(stack, case)
    for rank, loss in enumerate(exact["losses"]):
        here = found[rank][stack, case]
        assert_close(here["loss"], loss, TOLERANCES.get(case, 1e-6))
        assert here["gradients"].keys() == exact["gradients"].keys() != set()
        assert_close(here["gradients"], exact["gradients"], TOLERANCES.get(case, 1e-6))


@on_both("save", "switch", "merge")
def test_what_was_trained_is_what_one_process_trains(
    stack: str, case: str, found: list[dict[Any, Any]]
) -> None:
    exact = alone(stack, case)["outputs"]
    assert not torch.equal(exact["on"], exact["off"])
    for rank in found:
        assert rank[stack, case]["outputs"].keys() == exact.keys()
        assert_close(rank[stack, case]["outputs"], exact, TOLERANCES.get(case, 1e-6))


def test_quantized_parts_are_not_quantized_again(found: list[dict[Any, Any]]) -> None:
    for rank in found:
        said = rank["FSDP2", "NF4"]["said"]
        assert "MergeError: model.layers.0.self_attn.q_proj.weight is quantized" in said
        assert "Leave out requantize=True" in said
