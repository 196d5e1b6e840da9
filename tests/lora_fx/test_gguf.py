"""GGUF files: models that transformers loads, and weights that are read one at a time."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_fx
from lora_fx import CheckpointError
from lora_fx.formats import dense, quantization_of
from tests.docs.pages import ROOT, blocks
from tests.numerics import assert_same_bits

pytest.importorskip("gguf")

import gguf

from tests.gguf_files import KINDS, write_gguf

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
Q8_0 = gguf.GGMLQuantizationType.Q8_0
# The names of transformers, and those of llama.cpp.
LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-6, **options))


def qwen3(**options: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64, **options))


def qwen3_moe() -> Any:
    config = Qwen3MoeConfig(
        **SIZES, head_dim=64, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2
    )
    return Qwen3MoeForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=97, n_positions=64)
    )


def lfm2() -> Any:
    kinds = ["conv", "full_attention"]
    sizes = {**SIZES, "num_hidden_layers": 2}
    return Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=kinds, block_auto_adjust_ff_dim=False))


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", llama),
    "llama, tied": ("llama", lambda: llama(tie_word_embeddings=True)),
    "qwen2": ("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "qwen3": ("qwen3", qwen3),
    "qwen3 moe": ("qwen3moe", qwen3_moe),
    "gpt2": ("gpt2", gpt2),
    "lfm2": ("lfm2", lfm2),
}


def loaded(path: Path, **options: Any) -> Any:
    """The model that transformers loads."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


def empty(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make().eval()


def values_of(parameter: Any) -> torch.Tensor:
    return parameter.detach() if quantization_of(parameter) is None else dense(parameter)


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The values of a file, as gguf decodes them."""
    reader = gguf.GGUFReader(path)
    return {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}


def turned_back(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of transformers: the first halves of all pairs of a head, then the second halves."""
    of_head = values.shape[0] // heads
    order = np.concatenate([h * of_head + np.r_[0:of_head:2, 1:of_head:2] for h in range(heads)])
    return values[order]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", llama(), "llama", Q8_0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_those_of_gguf(kind: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", kind)
    model, expected = loaded(path), decoded(path)
    assert expected.keys() == {f"{name}.weight" for name in LAYERS.values()}
    read = lora_fx.quantize(empty(llama), "int8", exclude=["o_proj"], weights=path)
    for ours, theirs in LAYERS.items():
        values = expected[f"{theirs}.weight"]
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(theirs)
        if heads is not None:
            values = turned_back(values, heads)
        assert_same_bits(model.get_parameter(f"{ours}.weight").detach(), torch.tensor(values))
        if theirs in ("token_embd", "output", "output_norm", "blk.0.attn_output"):
            assert_same_bits(read.get_parameter(f"{ours}.weight").detach(), torch.tensor(values))


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_read_one_at_a_time(name: str, tmp_path: Path) -> None:
    architecture, make = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    path = write_gguf(tmp_path / "model.gguf", model, architecture, Q8_0)
    theirs = loaded(path, config=model.config)
    for format_name in ("nf4", "int8"):
        result = lora_fx.quantize(empty(make), format_name, weights=path)
        expected = lora_fx.quantize(theirs, format_name)
        for key, parameter in expected.named_parameters():
            assert_same_bits(values_of(result.get_parameter(key)), values_of(parameter))
        with torch.no_grad():
            assert_same_bits(result(IDS).logits, expected(IDS).logits)


def test_a_model_that_llama_cpp_calls_by_another_name(file: Path) -> None:
    # transformers itself does not find the names of a Mistral.
    mistral = lambda: MistralForCausalLM(MistralConfig(**SIZES))  # noqa: E731
    result = lora_fx.quantize(empty(mistral), "int8", weights=file)
    expected = lora_fx.quantize(empty(llama), "int8", weights=file)
    assert type(result) is MistralForCausalLM
    for key, parameter in expected.named_parameters():
        assert_same_bits(values_of(result.get_parameter(key)), values_of(parameter))


def test_it_is_trained_merged_saved_and_exported(file: Path, tmp_path: Path) -> None:
    base = loaded(file)
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4))
    assert_same_bits(adapted(IDS).logits, base(IDS).logits)
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(adapted), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged: Any = lora_fx.merge(adapted)
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_bits(again(IDS).logits, merged(IDS).logits)
    report = lora_fx.export_onnx(merged, tmp_path / "model.onnx", IDS)
    assert report.verified
    # The argument of the rewrite is as transformers has made it.
    assert base.hf_quantizer is not None


def test_the_code_of_the_guide(file: Path) -> None:
    page = (ROOT / "docs" / "guides" / "quantized.md").read_text(encoding="utf-8")
    (code,) = (block.text for block in blocks(page) if "def load_gguf" in block.text)
    names: dict[str, Any] = {"torch": torch, "lora_fx": lora_fx}
    exec(code, names)
    base = names["load_gguf"](str(file.parent), file.name)
    assert base.lm_head.weight.dtype == torch.bfloat16
    expected = loaded(file).lm_head.weight.detach().to(torch.bfloat16)
    assert_same_bits(base.lm_head.weight.detach(), expected)
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("read", ["whole", "one at a time"])
def test_it_is_quantized_saved_and_loaded(read: str, file: Path, tmp_path: Path) -> None:
    if read == "whole":
        base = lora_fx.quantize(loaded(file), "nf4")
    else:
        base = lora_fx.quantize(empty(llama), "nf4", weights=file)
    base.save_pretrained(tmp_path / "nf4")
    assert (
        load_file(tmp_path / "nf4" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype
        == torch.uint8
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    for key, parameter in base.named_parameters():
        assert_same_bits(values_of(again.get_parameter(key)), values_of(parameter))
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4))
    errors = lora_fx.replace_lora_weights_loftq(adapted, file)
    assert len(errors) == 7
    for row in errors:
        assert row.after < row.before


def test_no_more_than_one_weight_is_dense_at_a_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[int, int] = {}
    peaks = []
    original = gguf.dequantize

    def counted(*args: Any) -> np.ndarray:
        values: np.ndarray = original(*args)
        alive[id(values)] = values.nbytes
        weakref.finalize(values, alive.pop, id(values))
        peaks.append(sum(alive.values()))
        return values

    monkeypatch.setattr(gguf, "dequantize", counted)
    lora_fx.quantize(empty(llama), "int8", weights=file)
    assert len(peaks) == 12
    assert max(peaks) <= 2 * 256 * 256 * 4  # the weight before, and the next


# --- what is refused ----------------------------------------------------------------------------------


def refused(path: Path, words: str, make: Callable[[], Any] = llama) -> None:
    with pytest.raises(CheckpointError, match=words):
        lora_fx.quantize(empty(make), "int8", weights=path)


def test_files_that_are_damaged_or_no_gguf_files(file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing.gguf", r"nothing\.gguf cannot be read .*give an existing file")
    refused(tmp_path, rf"found none\. For GGUF, give the file: .*{file.name}")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(64))
    refused(other, r"other\.gguf is no GGUF file")
    whole = file.read_bytes()
    for size in (40, 500, len(whole) // 2):
        other.write_bytes(whole[:size])
        refused(other, r"other\.gguf is truncated or damaged .*: copy it again")


def test_a_model_that_the_file_does_not_hold(file: Path) -> None:
    refused(file, r"without .*q_norm\.weight", qwen3)
    refused(
        file,
        r"model\.layers\.0\.mlp\.\w+_proj\.weight has 65536 values there and 131072 in the model",
        lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 512})),
    )
    refused(
        file, "no model of transformers", lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in "ab"))
    )


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "nothing")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(
        path, "the architecture 'nothing', which transformers does not read as a LlamaForCausalLM"
    )


def test_a_part_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, llama(), "llama", Q8_0, also=lambda w: w.add_uint16("split.count", 2))
    refused(path, "one of 2 parts of a model.*llama-gguf-split --merge")


def scaled(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))


def test_rotary_positions_that_transformers_would_get_wrong(tmp_path: Path) -> None:
    # transformers loads such a file, and its configuration has the default positions.
    path = write_gguf(tmp_path / "model.gguf", llama(), "llama", Q8_0, also=scaled)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).rope_parameters == {
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
    refused(path, r"scales rotary positions \(rope_freqs\.weight\).* config\.json of the model")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    make = lambda: llama(rope_parameters=rope)  # noqa: E731
    assert lora_fx.quantize(empty(make), "int8", weights=path) is not None
    write_gguf(
        path,
        llama(),
        "llama",
        Q8_0,
        also=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    )
    refused(path, r"\(llama\.rope\.scaling\.type = yarn\)")


def test_without_gguf(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(file, r"needs gguf: pip install 'lora-fx\[quant\]'")
