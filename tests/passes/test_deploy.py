"""The pass that rounds adapted weights: which nodes it writes, and what it leaves alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx import LoraConfig
from lora_fx.formats import deployment
from lora_fx.ir import Capture
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.insert import AddFactors, Insert
from lora_fx.passes.match import MARKS, FindOperations
from lora_fx.passes.optimize import Deploy
from lora_fx.passes.pipeline import run_passes
from lora_fx.passes.plan import MakePlan
from tests.golden import check_golden, printed


class Layers(nn.Module):
    """A layer, and a product with a weight that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)
        self.columns = nn.Parameter(torch.randn(64, 32))
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.layer(x)) @ self.columns)
        return y


def inserted(deploy: str | None) -> Capture:
    torch.manual_seed(0)
    how = None if deploy is None else deployment(deploy)
    config = LoraConfig(r=4, target_modules=["layer", "columns"])
    passes = (FindOperations(), *MARKS, MakePlan(config, deploy=how), AddFactors(), Insert())
    return run_passes(capture(Layers()), passes)


def test_golden() -> None:
    result = Deploy()(inserted("bf16"))
    assert result.modified
    regions = result.capture.regions
    check_golden(
        "deploy",
        f"# layer\n{printed(regions['layer'].graph)}\n# root\n{printed(regions[''].graph)}",
    )


def test_branches_without_a_storage_stay() -> None:
    before = inserted(None)
    result = Deploy()(before)
    assert not result.modified
    assert result.capture is before


def test_a_second_run_changes_nothing() -> None:
    once = Deploy()(inserted("bf16")).capture
    assert not Deploy()(once).modified
