"""Half precision under a task, with adapters as inputs, and in several files at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.export import onnx as pipeline
from lora_fx.export.copy import Casts
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.export.staging import Scratch
from lora_fx.export.verify import PrecisionError
from lora_fx.passes.graph.copies import share_copy

VOCABULARY = 61
IDS = torch.arange(3, 10)[None]
WIDE = "the model in PyTorch in fp32, its weights rounded to float16"


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def with_two_adapters(base: Any) -> Any:
    model = None
    for name, rank in (("one", 2), ("two", 3)):
        config = lora_fx.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        if model is None:
            model = lora_fx.rewrite(base, config, adapter_name=name)
        else:
            lora_fx.add_adapter(model, config, name)
    return model


def test_a_cache_and_adapters_are_judged_in_fp32_with_one_set_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: Counter[tuple[torch.Size, torch.dtype]] = Counter()

    class Counting(Scratch):
        def keep(self, tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            kept[tensor.shape, tensor.dtype] += 1
            return super().keep(tensor, compute)

    monkeypatch.setattr(pipeline, "Scratch", Counting)
    model = with_two_adapters(llama())
    report = export_onnx(
        model, tmp_path / "m.onnx", IDS, task="text-generation", adapters="inputs", dtype="fp16"
    )
    assert report.dtype == "fp16"
    assert report.reference == WIDE
    suffixes = (
        "",
        " with adapter 'one'",
        " with adapter 'two'",
        *(f" with a random adapter of rank {rank}" for rank in (3, 1)),
    )
    outputs = ("logits", "present.0.key", "present.0.value")
    assert {row.name for row in report.parity} == {f"{o}{s}" for s in suffixes for o in outputs}
    for row in report.parity:
        assert row.tolerance == 1e-2
        assert row.pytorch_rel_error is not None
        # fp16 rounds, and nothing is compared with itself.
        assert 0 < row.max_rel_error < 5e-3
    # The embedding and the head: whatever copies there are, each is cast once and widened once.
    table = torch.Size((VOCABULARY, 16))
    assert kept[table, torch.float16] == kept[table, torch.float32] == 2
    heads = "past_key_values.0.key[1]"
    assert report.fixed_axes[heads] == "not one that the task varies"


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.0.self_attn.v_proj.weight"])
def test_a_step_that_overflows_says_so(tmp_path: Path, weight: str) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter(weight).fill_(3e4)
        model.model.embed_tokens.weight.abs_()
    with pytest.raises(PrecisionError, match=r"overflows in fp16: output 'logits'.*input_ids"):
        export_onnx(model, tmp_path / "m.onnx", IDS, task="text-generation", dtype="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1e3, "with adapter 'default': the model overflows in fp16: output 'output'"),
        (3e4, r"adapter 'default' overflows in float16: 0\.lora_B\.weight.* up to 1\.2e\+05 "),
    ],
)
def test_an_adapter_that_overflows_is_named(tmp_path: Path, size: float, message: str) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = lora_fx.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    with torch.no_grad():
        model[0].lora_A.default.fill_(size)
        model[0].lora_B.default.fill_(size)
    with pytest.raises(PrecisionError, match=message):
        export_onnx(
            model, tmp_path / "m.onnx", torch.rand(2, 4) + 1, adapters="inputs", dtype="fp16"
        )
    assert not list(tmp_path.iterdir())


def test_an_encoder_and_its_decoder_in_half_precision_and_in_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    path, model = tmp_path / "m.onnx", transformers.T5ForConditionalGeneration(config).eval()
    report = export_onnx(
        model, path, IDS, task="text2text-generation", dtype="fp16",
        external_data_bytes=0, shard_bytes=3000,
    )  # fmt: skip
    assert report.encoder is not None
    assert report.reference == report.encoder.reference == WIDE
    assert all(row.pytorch_rel_error is not None for row in report.parity + report.encoder.parity)
    assert len(report.data_files) > 1
    assert len(report.encoder.data_files) > 1
    every = {**report.files, **report.encoder.files}
    assert every == {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    tokens = [
        OnnxSession(path, "cpu", low_memory=low).generate(IDS, max_new_tokens=4)
        for low in (False, True)
    ]
    assert torch.equal(*tokens)


def test_each_weight_is_cast_once_whatever_copy_it_is_in() -> None:
    made = []

    def keep(tensor: Tensor, compute: Callable[[], Tensor] | None = None) -> Tensor:
        made.append(tensor)
        return tensor

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    casts = Casts(keep)
    half = casts(model[0].weight, torch.float16)
    assert casts(share_copy(model)[1].weight, torch.float16) is half
    assert casts(half, torch.float32) is not casts(model[0].weight, torch.float64)
    assert [tensor.dtype for tensor in made] == [torch.float16, torch.float32, torch.float64]
    assert torch.equal(half, model[0].weight.half())
    # Part of a weight, and another view of it, are other weights.
    part, turned = nn.Parameter(half.detach()[:2]), nn.Parameter(half.detach().T)
    assert torch.equal(casts(part, torch.float32), part.float())
    assert torch.equal(casts(turned, torch.float32), turned.float())
    empty = [nn.Parameter(torch.empty(0, size)) for size in (2, 3)]
    assert [tuple(casts(one, torch.float16).shape) for one in empty] == [(0, 2), (0, 3)]
