"""The pass alone: which nodes it puts where, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.formats import storage
from lora_fx.ir.graph import Capture
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.graph import install, is_region, kept_graph
from lora_fx.passes.pipeline import find_operations
from lora_fx.passes.quantize import Quantize, plan_quantization
from tests.golden import check_golden, printed


class Ways(nn.Module):
    """A linear operation in each way that the pass writes it, one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(32, 32))
        self.columns = nn.Parameter(torch.randn(32, 32))
        self.twice = nn.Parameter(torch.randn(32, 32))
        self.bias = nn.Parameter(torch.randn(32))
        self.table = nn.Parameter(torch.randn(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.rows, self.bias)
        x = torch.addmm(self.bias, x, self.columns)
        x = torch.addmm(self.table, x, self.twice)
        return torch.relu(x @ self.twice)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([Ways(), Ways()])
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.ways:
            x = one(x)
        return self.head(x)


def quantized(format_name: str, exclude: list[str] | None = None) -> tuple[Capture, Capture]:
    torch.manual_seed(0)
    before = capture(Model())
    plan = plan_quantization(before, find_operations(before), storage(format_name), exclude)
    return before, Quantize(plan.weights, plan.storage)(before).capture


def test_golden() -> None:
    before, after = quantized("nf4")
    check_golden(
        "quantize",
        f"# before\n{printed(before.regions['ways.0'].graph)}\n"
        f"# after\n{printed(after.regions['ways.0'].graph)}",
    )


def test_equal_modules_share_their_graph_where_the_same_is_stored() -> None:
    _, after = quantized("int8")
    assert after.regions["ways.0"].graph is after.regions["ways.1"].graph
    _, after = quantized("int8", ["ways.1.rows"])
    assert after.regions["ways.0"].graph is not after.regions["ways.1"].graph
    assert not after.regions["ways.0"].fallback


def test_graphs_of_the_input_stay_and_nothing_to_do_is_said() -> None:
    before, after = quantized("nf4")
    assert "quantized_linear" not in printed(before.regions["ways.0"].graph)
    assert after.regions["head"].graph is before.regions["head"].graph
    result = Quantize((), storage("nf4"))(before)
    assert not result.modified
    assert result.capture is before


@pytest.fixture
def kept() -> nn.Module:
    _, after = quantized("nf4")
    install([after.regions["ways.0"]], kept=True)
    return after.model.ways[0]


def test_a_kept_graph_is_taken_over_by_a_capture(kept: nn.Module) -> None:
    found = kept_graph(kept)
    assert found is not None
    whole = nn.Sequential(kept, nn.Linear(32, 2))
    again = capture(whole)
    assert again.regions["0"].graph is found
    assert not is_region(again.model[0])
    assert is_region(whole[0])
