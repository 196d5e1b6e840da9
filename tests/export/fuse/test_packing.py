"""One product for query, key, value and the adapters at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import lora_fx
from lora_fx.export.fuse import Target, fuse
from lora_fx.export.fuse.products import pack_products
from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport
from lora_fx.export.session import OnnxSession
from tests.export.fuse.small import VOCABULARY, adapted, decoder, prompts


def export(model: Any, path: Path, **options: Any) -> ExportReport:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    report = export_onnx(model, path, ids, task="text-generation", optimize="runtime", **options)
    assert report.optimize == "runtime"
    assert report.verified
    return report


def same_tokens(model: Any, session: OnnxSession, adapter: Any = None) -> bool:
    ids, mask = prompts()
    want = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    got = session.generate(ids, mask, max_new_tokens=5, eos_token_id=[], adapter=adapter)
    return torch.equal(got, want)


def split_widths(path: Path) -> list[list[int]]:
    return [
        node.inputs[1].const_value.numpy().tolist()
        for node in ir.load(path).graph
        if node.op_type == "Split"
    ]


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_three_products_are_one(tmp_path: Path, kind: str) -> None:
    model = decoder(kind)  # phi has biases, which are packed too
    report = export(model, tmp_path / "m.onnx")
    assert report.fused["packed-products"] == 2
    assert split_widths(tmp_path / "m.onnx") == [[64, 32, 32]] * 2
    assert same_tokens(model, OnnxSession(tmp_path / "m.onnx", "cpu"))


@pytest.mark.parametrize("dora", [False, True])
def test_inline_adapters_have_one_stacked_factor(tmp_path: Path, dora: bool) -> None:
    model = adapted(decoder("llama"), use_dora=dora)
    report = export(model, tmp_path / "m.onnx", adapters="inline")
    assert report.fused["packed-products"] == 2
    # The gain of DoRA comes with its scale.
    assert report.fused.get("branch-scale") == (None if dora else 14)
    assert split_widths(tmp_path / "m.onnx") == [[64, 32, 32, 4, 4, 4]] * 2
    assert same_tokens(model, OnnxSession(tmp_path / "m.onnx", "cpu"))


@pytest.mark.parametrize("dora", [False, True])
def test_swappable_adapters_stay_beside_one_product(tmp_path: Path, dora: bool) -> None:
    model = adapted(decoder("llama"), use_dora=dora)
    report = export(model, tmp_path / "m.onnx", adapters="inputs")
    assert report.fused["packed-products"] == 2
    assert split_widths(tmp_path / "m.onnx") == [[64, 32, 32]] * 2
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    session.load_adapter("own", model)
    assert same_tokens(model, session, "own")
    with lora_fx.disable_adapter(model):
        assert same_tokens(model, session)


def test_quantized_weights_are_packed_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(lora_fx.quantize(decoder("llama"), "nf4"))
    report = export(model, tmp_path / "m.onnx")
    assert report.adapters == "inline"
    assert report.fused["packed-products"] == 2
    assert report.operators["MatMulBnb4"] == 10, "five products a layer"
    assert sum(form.weights for form in report.quantized) == 14
    assert same_tokens(model, OnnxSession(tmp_path / "m.onnx", "cpu"))


def test_projections_of_different_forms_are_left(tmp_path: Path) -> None:
    export(decoder("llama"), tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    count, why = pack_products(model)
    assert count == 0, "a second run finds nothing to pack"
    assert why == {"query, key and value are no products of one input": 2}


def test_a_weight_that_something_else_reads_is_left(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ids = torch.randint(3, VOCABULARY, (2, 6))
    export_onnx(decoder("llama"), path, ids, task="text-generation", optimize="none", verify=False)
    model = ir.load(path)
    weight = model.graph.initializers["model.layers.0.self_attn.q_proj.weight"]
    reader = ir.node("Identity", [weight])
    reader.outputs[0].name, reader.outputs[0].dtype = "weight", weight.dtype
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    fused = fuse(model, Target("runtime"))
    assert fused.done["packed-products"] == 1
    assert fused.refused["packed-products"].endswith("(1×)")
    assert weight.name in model.graph.initializers
