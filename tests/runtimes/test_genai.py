"""The folder of ``target="genai"``, run by onnxruntime-genai: its tokens are PyTorch's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.runtimes.conftest import require

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def installed() -> None:
    require("genai")


IDS = torch.tensor([[5, 9, 3, 7]])


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "eos_token_id": 63,
        "pad_token_id": 0,
        **options,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    # Logits far apart: equal tokens then say something.
    nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def generated(model: nn.Module, prompts: list[list[int]], length: int) -> list[list[int]]:
    """The tokens of each prompt by itself."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_length=length, do_sample=False)
        rows.append(out[0].tolist())
    return rows


def adapted(seed: int = 0, **options: Any) -> nn.Module:
    model = lora_fx.rewrite(llama(), LoraConfig(**{"r": 4, **options})).eval()
    torch.manual_seed(seed)
    randomize(model)
    # What half precision can still tell apart.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.2)
    return model


@pytest.mark.parametrize("optimize", ["standard", "runtime"])
@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_merged_model_generates_what_pytorch_does(
    dtype: Any, optimize: Any, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    model = adapted()
    report = lora_fx.export_onnx(
        model,
        tmp_path / "m",
        IDS,
        target="genai",
        dtype=dtype,
        optimize=optimize,
    )
    assert ("GroupQueryAttention" in report.operators) == (optimize == "runtime")
    assert set(report.companions) == {"genai_config.json"}
    assert sorted(one.name for one in (tmp_path / "m").iterdir()) == [
        "genai_config.json",
        "model.onnx",
    ]
    config = json.loads((tmp_path / "m/genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] == (optimize == "runtime")
    prompts = [[5, 9, 3, 7]]
    found = consume("genai", "run_genai.py", tmp_path / "m", 16, json.dumps(prompts))
    expected = generated(model, prompts, 16)
    assert found[0][: len(expected[0])] == expected[0]
    assert len(expected[0]) >= 8


@pytest.mark.parametrize("optimize", ["standard", "runtime"])
def test_padded_batches_and_two_adapters(
    optimize: Any, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    model = adapted(1)
    lora_fx.add_adapter(model, LoraConfig(r=8, lora_alpha=4), "code")
    randomize(model)
    folder = tmp_path / "m"
    report = lora_fx.export_onnx(
        model,
        folder,
        IDS,
        target="genai",
        adapters="inputs",
        optimize=optimize,
    )
    assert sorted(report.companions) == [
        "adapters/code.onnx_adapter",
        "adapters/default.onnx_adapter",
        "genai_config.json",
    ]
    prompts = [[5, 9, 3, 7], [8, 2], [4, 4, 1]]
    seen = []
    for name in ("default", "code"):
        lora_fx.set_adapter(model, name)
        found = consume(
            "genai",
            "run_genai.py",
            folder,
            12,
            json.dumps(prompts),
            folder / f"adapters/{name}.onnx_adapter",
        )
        expected = generated(model, prompts, 12)
        for row, prompt, right in zip(found, prompts, expected, strict=True):
            # A shorter prompt is followed by its padding, and that by what was generated.
            longest = max(map(len, prompts))
            assert row[: len(prompt)] == prompt
            new = row[longest:]
            wanted = right[len(prompt) :][: len(new)]
            # A row that has come to its end is padded while others go on.
            assert new[: len(wanted)] == wanted
            assert set(new[len(wanted) :]) <= {0}
            assert len(wanted) >= 4
        seen.append(found)
    assert seen[0] != seen[1]
