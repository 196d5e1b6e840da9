"""Whole models with fused branches: in several processes, and exported unmerged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

import lora_fx
from lora_fx.ir.graph import Role
from tests.fused import roles
from tests.numerics import assert_close
from tests.ranks import RANKS, WAYS, alone, run_rank
from tests.zoo import Residual


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Gradients of every way, of one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return torch.load(folder / "gradients.pt")


# A process group has to be the only one of its worker's: these are run by one.
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way, marks=pytest.mark.feature("DDP" if way.startswith("ddp") else "FSDP2", "train")
        )
        for way in WAYS
    ],
)
def test_gradients_of_several_processes(way: str, found: dict[str, dict[str, Tensor]]) -> None:
    expected = alone(way)
    assert found[way].keys() == expected.keys() != set()
    assert all(".lora_" in name for name in expected)
    assert {grad.dtype for grad in found[way].values()} == {torch.float32}
    tolerance = 5e-2 if "bf16" in way else 1e-5
    for name, grad in expected.items():
        assert_close(found[way][name], grad, tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_unmerged_model_is_exported(dropout: float, tmp_path: Path) -> None:
    config = lora_fx.LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False)
    model = lora_fx.rewrite(Residual(), config).eval()
    assert Role.FUSED in roles(model)
    ids = torch.arange(12).view(3, 4) % 11
    report = lora_fx.export_onnx(model, tmp_path / "model.onnx", ids)
    assert report.verified, report
    with torch.no_grad():
        expected = model(ids)
    session = lora_fx.OnnxSession(tmp_path / "model.onnx", provider="cpu")
    (result,) = session.run({"ids": ids}).values()
    assert_close(torch.as_tensor(result), expected)
