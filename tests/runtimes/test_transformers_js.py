"""The folder of ``target="transformers.js"``, run by transformers.js in Node: what it gives is PyTorch's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ExportError, LoraConfig
from tests.algebra import randomize
from tests.runtimes.conftest import require
from tests.runtimes.test_genai import IDS, adapted, generated

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def installed() -> None:
    require("js")


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=2, num_labels=3, **sizes)
    ).eval()


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("external", [False, True])
def test_a_decoder_generates_what_pytorch_does(
    dtype: Any, external: bool, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    model = adapted()
    folder = tmp_path / "m"
    report = lora_fx.export_onnx(
        model,
        folder,
        IDS,
        task="text-generation",
        target="transformers.js",
        dtype=dtype,
        optimize="runtime" if external else "standard",
        external_data_bytes=0 if external else 1 << 28,
    )
    stem = "model_fp16" if dtype else "model"
    names = {f"{stem}.onnx"} | ({f"{stem}.onnx_data"} if external else set())
    assert {one.name for one in (folder / "onnx").iterdir()} == names
    assert report.inputs["input_ids"] == ("batch_size", "sequence_length")
    given = {"ids": IDS.tolist(), "mask": torch.ones_like(IDS).tolist(), "new": 10}
    found = consume(
        "js",
        "run_transformers.mjs",
        "generate",
        folder,
        "fp16" if dtype else "fp32",
        json.dumps(given),
    )
    expected = generated(model, IDS.tolist(), 14)
    assert found == expected


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_classifier_gives_what_pytorch_does(
    dtype: Any, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    model = lora_fx.rewrite(bert(), LoraConfig(r=4)).eval()
    randomize(model)
    mask = torch.ones_like(IDS)
    folder = tmp_path / "m"
    example = {"input_ids": IDS, "attention_mask": mask}
    lora_fx.export_onnx(model, folder, example, target="transformers.js", dtype=dtype)
    rows = torch.tensor([[5, 9, 3, 7], [8, 2, 0, 0]])
    masks = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = {"ids": rows.tolist(), "mask": masks.tolist()}
    found = consume(
        "js",
        "run_transformers.mjs",
        "classify",
        folder,
        "fp16" if dtype else "fp32",
        json.dumps(given),
    )
    with torch.no_grad():
        exact = model(input_ids=rows, attention_mask=masks).logits
    assert (found["type"], found["dims"]) == ("float32", [2, 3])
    error = np.abs(np.array(found["data"]).reshape(2, 3) - exact.numpy()).max()
    assert error <= (1e-2 if dtype else 1e-5) * float(exact.abs().max())


def test_what_it_cannot_load_is_refused(tmp_path: Path) -> None:
    model = lora_fx.rewrite(bert(), LoraConfig(r=4)).eval()
    for options, says in (
        ({"adapters": "inputs"}, "feeds no adapters"),
        ({"dtype": "bf16"}, "no bf16"),
        ({"task": "text2text-generation"}, "two files"),
    ):
        with pytest.raises(ExportError, match=says):
            lora_fx.export_onnx(
                model, tmp_path / "m", {"input_ids": IDS}, target="transformers.js", **options
            )
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ExportError, match=r"reads config\.json"):
        lora_fx.export_onnx(plain, tmp_path / "m", torch.ones(2, 4), target="transformers.js")
    assert not (tmp_path / "m").exists()
