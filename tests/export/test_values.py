"""Models with weights that are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.export import onnx as values


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


@pytest.mark.parametrize("name", ["2.weight", "0.bias", "1.running_var"])
def test_nan_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = layers()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = torch.nan
    with pytest.raises(ExportError, match=f"^{name} of Sequential hold NaN"):
        lora_fx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_adapters_that_diverged(tmp_path: Path) -> None:
    model = lora_fx.rewrite(layers(), lora_fx.LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    for adapters in ("merge", "inputs"):
        with pytest.raises(ExportError, match=r"lora_B\..* of Sequential hold NaN"):
            lora_fx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4), adapters=adapters)


def test_the_last_value_of_a_weight_is_looked_at() -> None:
    model = nn.Linear(5, 7)
    values._refuse_nan(model)
    with torch.no_grad():
        model.weight[6, 4] = torch.nan
    with pytest.raises(ExportError, match="weight of Linear"):
        values._refuse_nan(model)


def test_infinite_values_pass() -> None:
    model = layers()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    values._refuse_nan(model)
