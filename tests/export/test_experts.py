"""Mixtures of experts as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.export import onnx as exporting
from tests.mixtures import IDS, MODELS  # which imports transformers, and its operation
from tests.numerics import assert_close

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("mixtral", "eager"),
        ("gpt_oss", "grouped_mm"),  # stored [in, out], with biases
        pytest.param("gpt_oss", "batched_mm", marks=SLOW),
        pytest.param("mixtral", "grouped_mm", marks=SLOW),
        pytest.param("qwen3_moe", "grouped_mm", marks=SLOW),
        pytest.param("qwen3_moe", "eager", marks=SLOW),
        pytest.param("deepseek_v3", "batched_mm", marks=SLOW),
    ],
)
def test_mixture_with_adapters_on_its_experts(
    name: str, implementation: str, tmp_path: Path
) -> None:
    base = MODELS[name]()
    base.set_experts_implementation(implementation)
    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    model = lora_fx.rewrite(base, config).eval()
    path = tmp_path / "m.onnx"

    report = lora_fx.export_onnx(model, path, {"input_ids": IDS})

    assert report.dynamic_axes == {"input_ids": {0: "batch", 1: "sequence"}}
    assert report.verified
    assert base.config._experts_implementation == implementation
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    names = {one.name for one in graph.initializer}
    first = next(n for n, p in base.named_parameters() if p.ndim == 3)
    assert {f"{first}.{index}" for index in range(4)} <= names
    assert first not in names
    # One token: most experts have no row.
    (got,) = lora_fx.OnnxSession(path, "cpu").run({"input_ids": IDS[:1, :1]}).values()
    with torch.no_grad():
        assert_close(got, model(input_ids=IDS[:1, :1]).logits, 1e-5)


def test_half_precision_is_translated_too(tmp_path: Path) -> None:
    class Half(nn.Module):
        """PyTorch's own operation, which it exports in bf16 only."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8, 16).bfloat16())

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return nn.functional.grouped_mm(x, self.weight, offs=ends)

    ends = torch.tensor([3, 4, 6, 8, 12], dtype=torch.int32)
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(Half(), path, (torch.randn(12, 8).bfloat16(), ends), verify=False)

    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node].count("MatMul") == 5
    onnx.checker.check_model(str(path), full_check=True)


class Grouped(nn.Module):
    """Rows in groups that end where an input says, as transformers multiplies them when it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8, 16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: [rows, 8]; ends: [groups]."""
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)


@pytest.mark.parametrize("ends", [[2, 2, 7, 8, 12], [0, 0, 0, 0, 12], [12, 12, 12, 12, 12]])
def test_empty_groups(ends: list[int], tmp_path: Path) -> None:
    model = Grouped().eval()
    x, offsets = torch.randn(12, 8), torch.tensor([3, 4, 6, 8, 12], dtype=torch.int32)
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(model, path, (x, offsets), verify=False)

    given = torch.tensor(ends, dtype=torch.int32)
    (got,) = lora_fx.OnnxSession(path, "cpu").run([x, given]).values()

    with torch.no_grad():
        assert_close(got, model(x, given), 1e-6)


def test_rows_behind_the_last_group_are_zero(tmp_path: Path) -> None:
    x, offsets = torch.randn(12, 8), torch.tensor([3, 4, 6, 8, 10], dtype=torch.int32)
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(Grouped().eval(), path, (x, offsets), verify=False)

    (got,) = lora_fx.OnnxSession(path, "cpu").run([x, offsets]).values()

    assert got.shape == (12, 16)
    assert not got[10:].any()
    assert got[:10].all()


def test_matrices_that_are_computed(tmp_path: Path) -> None:
    class Scaled(Grouped):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight * x.mean(), ends)

    model = Scaled().eval()
    x, offsets = torch.randn(12, 8), torch.tensor([3, 4, 6, 8, 12], dtype=torch.int32)
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(model, path, (x, offsets), verify=False)

    (got,) = lora_fx.OnnxSession(path, "cpu").run([x, offsets]).values()

    with torch.no_grad():
        assert_close(got, model(x, offsets), 1e-6)


@pytest.mark.parametrize(("bins", "low", "high"), [(4, 0, 3), (10, -1.0, 1.0), (3, 0.5, 2.0)])
def test_histogram(bins: int, low: float, high: float, tmp_path: Path) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.histc(x, bins=bins, min=low, max=high)

    x = torch.cat([torch.arange(-8, 16) / 4, torch.tensor([float(low), float(high)])])
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(Counts(), path, x, verify=False)

    (got,) = lora_fx.OnnxSession(path, "cpu").run([x]).values()

    assert torch.equal(got, Counts()(x))


def test_unknown_grouped_product_names_what_there_is(tmp_path: Path) -> None:
    class Batched(nn.Module):
        """Two matrices of three dimensions: another product by the same name."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 16).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.grouped_mm(x, self.weight)

    with pytest.raises(lora_fx.errors.ExportError, match="grouped product is translated for"):
        lora_fx.export_onnx(Batched(), tmp_path / "m.onnx", torch.randn(3, 4, 8).bfloat16())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_weights_of_single_experts_are_no_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = MODELS[name]().eval()
    stacks = {n: p.detach().numpy() for n, p in base.named_parameters() if p.ndim == 3}
    shared: dict[str, bool] = {}
    original = exporting.write

    def looking(model: ir.Model, *options: Any) -> dict[str, int]:
        for value in model.graph.initializers.values():
            stack, _, index = str(value.name).rpartition(".")
            if stack in stacks and value.const_value is not None:
                array = value.const_value.numpy()
                shared[f"{stack}.{index}"] = np.shares_memory(array, stacks[stack][int(index)])
        return original(model, *options)

    monkeypatch.setattr(exporting, "write", looking)
    lora_fx.export_onnx(
        base, tmp_path / "m.onnx", {"input_ids": IDS}, external_data_bytes=0, verify=False
    )
    assert len(shared) == sum(len(stack) for stack in stacks.values())
    assert all(shared.values())
