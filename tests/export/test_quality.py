"""A merged export is the base's graph with other numbers, and says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.export.adapter_manifest import Manifest
from lora_fx.export.factor_model import origin_metadata
from lora_fx.export.onnx import export_onnx


class Mixed(nn.Module):
    """A site of every dense kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embed(ids).mT).mT
        return self.head(self.linear(hidden).relu())


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=37, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    made = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, **options))
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(made):
            parameter.normal_(std=0.1)
    return made


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Mixed, {"target_modules": ["embed", "conv", "linear", "head"]}),
        (llama, {"target_modules": "all-linear"}),
        (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "bias": "all"}),
    ],
)
def test_a_merged_export_is_the_graph_of_the_base(
    tmp_path: Path, build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    base, ids = build(), torch.randint(3, 20, (2, 6))
    plain = export_onnx(base, tmp_path / "base.onnx", ids)
    merged = export_onnx(adapted(base, **options), tmp_path / "merged.onnx", ids)
    assert merged.nodes == plain.nodes == sum(plain.operators.values())
    assert merged.operators == plain.operators
    assert merged.initializers == plain.initializers
    assert merged.size_bytes == pytest.approx(plain.size_bytes, abs=2000)  # metadata

    def graph(name: str) -> list[tuple[object, ...]]:
        nodes = onnx.load(tmp_path / name).graph.node
        return [(node.op_type, node.name, *node.input, *node.output) for node in nodes]

    assert graph("merged.onnx") == graph("base.onnx")


def test_the_file_names_its_base_and_adapters_and_nothing_of_the_machine(tmp_path: Path) -> None:
    base = llama()
    base.config._name_or_path = str(tmp_path / "models" / "tiny-llama")
    model = adapted(
        base, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 4}, use_rslora=True,
        base_model_name_or_path=str(tmp_path / "models" / "tiny-llama"), seed=0,
    )  # fmt: skip
    lora_fx.add_adapter(model, lora_fx.LoraConfig(r=3, target_modules=["v_proj"]), "idle")
    report = export_onnx(model, tmp_path / "m.onnx", torch.randint(3, 99, (2, 6)))
    entries = onnx.load(tmp_path / "m.onnx").metadata_props
    found = {entry.key: entry.value for entry in entries}
    assert found == report.metadata
    assert found["lora_fx.version"] == lora_fx.__version__
    assert json.loads(found["lora_fx.base"]) == {
        "class": "transformers.models.llama.modeling_llama.LlamaForCausalLM",
        "name": "tiny-llama",
    }
    adapters = json.loads(found["lora_fx.merged"])
    assert list(adapters) == ["default"]
    assert adapters["default"] == {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {"0.self_attn.q_proj": 4},
        "use_rslora": True,
        "base_model_name_or_path": "tiny-llama",
        "seed": 0,
    }
    again = lora_fx.LoraConfig.from_dict(adapters["default"])
    assert again.rank_pattern == {"0.self_attn.q_proj": 4}
    assert str(tmp_path).encode() not in (tmp_path / "m.onnx").read_bytes()


def test_a_file_that_takes_adapters_names_its_base_alone(tmp_path: Path) -> None:
    base = Mixed()
    folder = str(tmp_path / "models" / "tiny")
    base.config = type("Config", (), {"_name_or_path": folder})()  # type: ignore[assignment]
    model, ids = adapted(base, target_modules=["linear"]), torch.randint(3, 20, (2, 6))
    report = export_onnx(model, tmp_path / "m.onnx", ids, adapters="inputs", verify=False)
    assert json.loads(report.metadata["lora_fx.base"])["name"] == "tiny"
    assert "lora_fx.merged" not in report.metadata
    manifest = Manifest.from_metadata(report.metadata)
    assert manifest is not None
    assert manifest.base == "Mixed (tiny)"
    assert str(tmp_path).encode() not in (tmp_path / "m.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("/home/me/models/tiny", "tiny"),
        ("../models/tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        (r"C:\models\tiny", "tiny"),
        ("", None),
    ],
)
def test_names_of_models_stay_and_folders_lose_their_path(name: str, public: str | None) -> None:
    model = Mixed()
    model.config = type("Config", (), {"_name_or_path": name})()  # type: ignore[assignment]
    entries = origin_metadata(model)
    assert json.loads(entries["lora_fx.base"]).get("name") == public
    assert "lora_fx.merged" not in entries
