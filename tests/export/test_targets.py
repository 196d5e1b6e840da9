"""Folders for onnxruntime-genai and transformers.js, as files: what is there, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ExportError, LoraConfig
from lora_fx.export.onnx import node_count
from tests.algebra import randomize
from tests.export.tiny import example, generator

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[5, 9, 3, 7], [8, 2, 11, 4]])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.BertConfig(num_hidden_layers=1, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def written(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    lora_fx.export_onnx(
        model, folder, {"input_ids": IDS}, target="transformers.js", verify=False, **options
    )
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def test_two_dtypes_share_a_folder_and_name_the_class(tmp_path: Path) -> None:
    model = lora_fx.rewrite(classifier(), LoraConfig(r=2, target_modules=["query"])).eval()
    randomize(model)
    folder = tmp_path / "js"
    values = written(model, folder, external_data_bytes=0)
    assert values["architectures"] == ["BertForSequenceClassification"]
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ExportError, match=r"config.json exists with another content"):
        written(model, folder, dtype="fp16", external_data_bytes=0)
    assert before == (folder / "config.json").read_bytes()
    assert not (folder / "onnx" / "model_fp16.onnx").exists()
    values = written(model, folder, dtype="fp16", external_data_bytes=0, force=True)
    both = {"model.onnx": True, "model_fp16.onnx": True}
    assert values["transformers.js_config"]["use_external_data_format"] == both


def test_files_of_others_are_replaced_by_force_only(tmp_path: Path) -> None:
    """As the folder of the model itself, whose config.json is another."""
    model = classifier()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    before = {one.name: one.read_bytes() for one in (tmp_path / "model").iterdir()}
    with pytest.raises(ExportError, match="exists with another content: pass force=True"):
        written(model, tmp_path / "model")
    there = {one.name: one for one in (tmp_path / "model").iterdir() if one.is_file()}
    assert before == {name: one.read_bytes() for name, one in there.items()}
    assert not list(tmp_path.glob("**/*.onnx"))


def test_a_model_in_bf16_is_refused_also_without_dtype(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"transformers\.js has no bf16"):
        written(classifier().to(torch.bfloat16), tmp_path / "js")
    assert not (tmp_path / "js").exists()


@pytest.mark.slow
def test_what_is_written_for_transformers_js_is_what_was_compared(tmp_path: Path) -> None:
    """Casts and names of axes too: a session reads the file as it reads others."""
    model = generator("llama")
    report = lora_fx.export_onnx(
        model,
        tmp_path / "js",
        example("llama"),
        task="text-generation",
        target="transformers.js",
        dtype="fp16",
    )
    file = tmp_path / "js" / "onnx" / "model_fp16.onnx"
    assert report.verified
    assert report.nodes == node_count(file)
    assert report.outputs["logits"][0] == "batch_size"
    graph = onnx.load(file).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    session = lora_fx.OnnxSession(file, "cpu")
    assert session.inputs[0].shape == ("batch", "sequence")
    prompt = torch.tensor([[5, 9, 3, 7]])
    found = session.generate(prompt, max_new_tokens=8)
    want = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert found.tolist() == want.tolist()


@pytest.mark.parametrize("target", ["genai", "transformers.js"])
def test_a_target_makes_a_decoder_of_a_model_that_generates(target: Any, tmp_path: Path) -> None:
    report = lora_fx.export_onnx(generator("llama"), tmp_path / "m", IDS, target=target)
    assert report.task == "text-generation"
    assert any(name.startswith("present.") for name in report.outputs)


def test_a_target_of_single_files_refuses_an_encoder_decoder_that_generates(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    config = transformers.T5Config(num_heads=2, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ExportError, match="two files"):
        lora_fx.export_onnx(model, tmp_path / "js", IDS, target="transformers.js")
    assert not (tmp_path / "js").exists()


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tokenizer= is a int"):
        written(classifier(), tmp_path / "js", tokenizer=3)
    with pytest.raises(ExportError, match="is unknown"):
        lora_fx.export_onnx(classifier(), tmp_path / "js", IDS, target=["genai"])  # type: ignore[arg-type]
    assert not (tmp_path / "js").exists()
