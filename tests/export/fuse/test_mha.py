"""Attention of encoders as one operator, alone and with its products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.export.fuse.attention import drop_nan_guards
from lora_fx.export.fuse.fused_attention import multi_head_attention
from lora_fx.export.fuse.graph import remove_dead
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from tests.export.fuse.small import VOCABULARY, adapted, operators
from tests.export.fuse.test_attention import attention


def encoder() -> Any:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=48,
    )
    model = t.BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    mask[2, :2] = 0
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 7)), "attention_mask": mask}


def test_an_encoder_has_one_attention_a_layer(tmp_path: Path) -> None:
    model, given = encoder(), inputs()
    report = export_onnx(model, tmp_path / "m.onnx", given, optimize="runtime")
    assert report.optimize == "runtime"
    assert report.operators["Attention"] == 2
    assert report.operators["MatMul"] == 6, "three are left of six a layer"
    assert not {"Softmax", "Transpose", "IsNaN", "MultiHeadAttention"} & set(report.operators)
    got = OnnxSession(tmp_path / "m.onnx", "cpu").run(given)["last_hidden_state"]
    with torch.no_grad():
        want = model(**given).last_hidden_state
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)


def test_adapters_at_the_products_stay_in_front(tmp_path: Path) -> None:
    model, given = adapted(encoder()), inputs()
    report = export_onnx(model, tmp_path / "m.onnx", given, optimize="runtime", adapters="inputs")
    assert report.optimize == "runtime"
    assert report.operators["MultiHeadAttention"] == 2
    assert report.not_fused["whole-attention"].startswith(
        "query, key and value are no plain products"
    )
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    session.load_adapter("own", model)
    seen = given["attention_mask"].bool()
    for adapter, context in (("own", None), (None, lora_fx.disable_adapter(model))):
        if context is not None:
            context.__enter__()
        with torch.no_grad():
            want = model(**given).last_hidden_state
        if context is not None:
            context.__exit__(None, None, None)
        got = session.run(given, adapter=adapter)["last_hidden_state"]
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)


def test_attention_that_is_laid_out_in_another_way_is_left() -> None:
    count, why = multi_head_attention(attention())
    assert count == 0
    assert why == {"a row of its mask may be -inf as a whole": 1}, "the guard is still there"
    for groups, words in (
        (4, "its heads are laid out in another way, or have a cache"),
        (2, "its heads share keys"),
    ):
        model = attention(groups=groups)
        drop_nan_guards(model)
        remove_dead(model)
        assert multi_head_attention(model) == (0, {words: 1})
        assert operators(model)["MultiHeadAttention"] == 0
