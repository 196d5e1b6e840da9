"""FSDP2 over quantized weights: it shards those of bitsandbytes and NF4, ignores others, and loses none."""

from __future__ import annotations

from typing import Any

import pytest
from torch import multiprocessing

from tests.numerics import assert_close
from tests.stacks.packed import LOST, RANKS, SHARDED, WHOLE, alone, packed
from tests.stacks.tensor_parallel import run_rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    import torch

    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder), RANKS, packed), nprocs=RANKS)
    return [torch.load(folder / f"packed {RANKS} {rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("how", "case"),
    [*(("sharded", case) for case in SHARDED), *(("whole", case) for case in WHOLE)],
)
def test_quantized_weights_train_as_in_one_process(
    how: str, case: str, found: list[dict[Any, Any]]
) -> None:
    exact = alone(case)
    for rank, loss in enumerate(exact["losses"]):
        here = found[rank][how, case]
        assert here["stored"]
        assert_close(here["loss"], loss, 1e-5)
        assert here["gradients"].keys() == exact["gradients"].keys() != set()
        assert_close(here["gradients"], exact["gradients"], 1e-5)
        if "outputs" in here:
            assert_close(here["outputs"], exact["outputs"], 1e-5)
        else:
            assert "MergeError: model.layers.0.self_attn.q_proj.weight is packed" in here["refused"]
            assert "lora_fx.quantized_parameters(model)" in here["refused"]


@pytest.mark.parametrize("case", LOST)
def test_sharded_weights_without_their_scales_are_refused(
    case: str, found: list[dict[Any, Any]]
) -> None:
    name = "mlp.experts.gate_up_proj" if "experts" in case else "self_attn.q_proj.weight"
    for rank in found:
        assert f"QuantizationError: model.layers.0.{name} is stored as" in rank["lost", case]
        assert "ignored_params=lora_fx.quantized_parameters(model)" in rank["lost", case]


def test_bytes_that_were_converted_as_values_are_refused(found: list[dict[Any, Any]]) -> None:
    for rank in found:
        assert "from torch.bfloat16 to torch.float16" in rank["converted"]
