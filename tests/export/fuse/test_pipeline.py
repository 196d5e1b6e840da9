"""Levels of fusion, where each fusion holds, what a report says, and what happens if a file is not equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.export.fuse import FUSIONS, Target, fuse, fusion_table, pipeline
from lora_fx.export.fuse.graph import nodes_of
from lora_fx.export.onnx import export_onnx
from tests.export.fuse.small import VOCABULARY, decoder, operators

IDS = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers as PyTorch gives them."""
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    model = decoder("llama", num_hidden_layers=8)
    report = export_onnx(model, path, IDS, task="text-generation", optimize="none", verify=False)
    assert report.optimize == "none"
    assert not report.fused
    return path


def test_a_llama_of_eight_layers_has_few_nodes(plain: Path) -> None:
    before = operators(plain).total()
    counts = {}
    for level in ("standard", "runtime"):
        model = ir.load(plain)
        fused = fuse(model, Target(level))
        assert not fused.refused
        counts[level] = operators(model).total()
    assert before > 700
    assert counts["standard"] < 520
    assert counts["runtime"] <= 130


def test_a_standard_file_has_operators_of_onnx_alone(plain: Path, tmp_path: Path) -> None:
    model = ir.load(plain)
    fuse(model, Target("standard"))
    assert {node.domain for node in model.graph} == {""}
    ir.save(model, tmp_path / "standard.onnx")
    onnx.checker.check_model(str(tmp_path / "standard.onnx"), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(str(tmp_path / "standard.onnx")), strict_mode=True, data_prop=True
    )
    assert len(inferred.graph.value_info) > 400


def test_the_checker_knows_every_operator_of_a_runtime_file(plain: Path, tmp_path: Path) -> None:
    model = ir.load(plain)
    assert fuse(model, Target("runtime")).done["skip-norm"] == 17
    ir.save(model, tmp_path / "runtime.onnx")
    onnx.checker.check_model(str(tmp_path / "runtime.onnx"), full_check=True)
    onnx.shape_inference.infer_shapes(
        onnx.load(str(tmp_path / "runtime.onnx")), check_type=True, strict_mode=True, data_prop=True
    )


def test_a_second_run_changes_nothing(plain: Path) -> None:
    model = ir.load(plain)
    for level in ("standard", "runtime"):
        fuse(model, Target(level))
        before = operators(model)
        assert fuse(model, Target(level)).done.keys() <= {"moves"}
        assert operators(model) == before


@pytest.mark.parametrize(
    ("provider", "dtype", "words"),
    [
        ("cuda", "fp32", "the cuda provider has no kernel for it in fp32"),
        ("cpu", "bf16", "the cpu provider has no kernel for it in bf16"),
    ],
)
def test_a_fusion_is_left_out_where_there_is_no_kernel(
    plain: Path, provider: Any, dtype: str, words: str
) -> None:
    model = ir.load(plain)
    fused = fuse(model, Target("runtime", provider, dtype))
    assert fused.refused["group-query-attention"] == words
    assert fused.done["grouped-heads"] == 8
    assert "GroupQueryAttention" not in operators(model)


def test_kernels_that_the_table_promises_are_there(plain: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = ir.load(plain)
    fuse(model, Target("runtime"))
    proto = ir.to_proto(model).SerializeToString()
    session = runtime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_fusion_that_is_wrong_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(model: ir.Model) -> tuple[int, dict[str, int]]:
        for node in nodes_of(model, "Softmax"):
            node.attributes["axis"] = ir.AttrInt64("axis", 2)
        return 1, {}

    bad = dataclasses.replace(FUSIONS[-1], name="wrong", apply=wrong, holds={"cpu": ("fp32",)})
    attention = next(one for one in FUSIONS if one.name == "group-query-attention")
    kept = [one for one in FUSIONS if one is not attention]
    monkeypatch.setattr(pipeline, "FUSIONS", (*kept, bad))
    report = export_onnx(
        decoder("llama"), tmp_path / "m.onnx", IDS, task="text-generation", optimize="runtime"
    )
    assert report.optimize == "standard"
    assert report.verified
    assert "wrong" not in report.fused
    assert "differs from" in report.not_fused["optimize='runtime'"]
    assert "not fused: optimize='runtime': " in str(report)
    assert "fewer fusions" in caplog.text
    assert {node.domain for node in ir.load(tmp_path / "m.onnx").graph} == {""}


def test_a_model_without_anything_to_fuse(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3).eval()
    report = lora_fx.export_onnx(
        model, tmp_path / "m.onnx", (torch.randn(2, 3),), optimize="runtime"
    )
    assert report.optimize == "runtime"
    assert not report.fused
    assert "fused" not in str(report)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimize": "fast"}, "optimize='fast' is unknown"),
        ({"provider": "cpu"}, "is for optimize='runtime'"),
        ({"optimize": "runtime", "provider": "tpu"}, "unknown provider 'tpu'"),
    ],
)
def test_unknown_levels_and_providers_are_refused(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        lora_fx.export_onnx(
            torch.nn.Linear(3, 3), tmp_path / "m.onnx", torch.randn(2, 3), **options
        )
    assert not list(tmp_path.iterdir())


def test_the_table_names_every_fusion() -> None:
    lines = fusion_table().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {one.name}" for one in FUSIONS]
    guide = Path(__file__).resolve().parents[3] / "docs" / "guides" / "export.md"
    assert fusion_table() in guide.read_text(), "python docs/fusions.py --write"
