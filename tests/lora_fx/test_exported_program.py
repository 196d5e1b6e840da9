"""Programs of ``torch.export`` have adapters as plain operations, which other runtimes can lay out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.algebra import randomize
from tests.numerics import assert_close


class SequenceFirst(nn.Module):
    """A layer whose input is transposed in memory, as attention leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).transpose(0, 1).chunk(2, -1)
        out: Tensor = self.second(left) + self.second(right)
        return out


VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"lora_bias": True},
    {"use_rslora": True, "rank_pattern": {"second": 3}},
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_view_and_nothing_in_place(
    options: dict[str, Any], trainable: bool, strict: bool
) -> None:
    config = lora_fx.LoraConfig(r=2, target_modules=["first", "second"], **options)
    model = lora_fx.rewrite(SequenceFirst(), config).eval()
    randomize(model)
    model.requires_grad_(trainable)
    x = torch.randn(3, 5, 8)
    program = torch.export.export(model, (x,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert not [name for name in names if "view" in name or name.split(".")[1:2] == ["addmm_"]]
    assert_close(program.module()(x), model(x), 1e-6)
