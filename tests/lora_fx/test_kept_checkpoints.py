"""Checkpoints of experts in MXFP4 and FP8, loaded as they are stored, trained over, merged and exported."""

from __future__ import annotations

import copy
import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import lora_fx
from lora_fx.errors import QuantizationError
from lora_fx.formats import Parts, StackedTensor, dense, mxfp4, quantization_of
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits

IDS = torch.arange(1, 25).reshape(2, 12)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "head_dim": 32,
}
CONFIG = lora_fx.LoraConfig(r=3, target_modules=None)


def gpt_oss(folder: Path) -> None:
    """A folder as OpenAI writes it. Every byte is a code, so that random ones will do."""
    config = GptOssConfig(
        **SIZES,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        layer_types=["full_attention"],
    )
    generator = torch.Generator().manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = tensors.pop(name).shape
        for end, shape, low, high in (
            ("blocks", (experts, out, inner // 32, 16), 0, 256),
            ("scales", (experts, out, inner // 32), 118, 124),
        ):
            made = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_{end}"] = made
    stored(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def qwen3_moe(folder: Path, width: int = 256) -> None:
    """A folder as Qwen writes it: the experts one by one, in blocks of 128 x 128."""
    config = Qwen3MoeConfig(
        **{**SIZES, "head_dim": 64},
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=width,
        num_experts=4,
    )
    how = FineGrainedFP8Config(weight_block_size=(128, 128))
    encoder = Fp8Quantize(types.SimpleNamespace(quantization_config=how))
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        if "experts" in name or "o_proj" in name:
            weight = tensors.pop(name)
            missing = [-size % 128 for size in weight.shape]
            made: Any = encoder.convert(
                {"weight": nn.functional.pad(weight, (0, missing[1], 0, missing[0]))}
            )
            codes = made["weight"].view(torch.uint8)[: weight.shape[0], : weight.shape[1]]
            made["weight"] = codes.contiguous().view(torch.float8_e4m3fn)
            tensors[name] = made["weight"].contiguous()
            tensors[f"{name}_scale_inv"] = made["weight_scale_inv"].contiguous()
    kept = ["q_proj", "k_proj", "v_proj", "lm_head"]
    how_stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored(folder, tensors, {**how_stored, "modules_to_not_convert": kept})


def stored(folder: Path, tensors: dict[str, Tensor], how: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


FOLDERS: dict[str, Callable[[Path], None]] = {"mxfp4": gpt_oss, "fp8": qwen3_moe}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / str(request.param)
    FOLDERS[request.param](path)
    return path


def kept(folder: Path) -> Any:
    with lora_fx.keep_quantized():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dequantized(folder: Path) -> Any:
    """What transformers itself makes of the folder here."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stacks(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if isinstance(p.detach(), StackedTensor)}


def test_the_weights_are_kept_and_have_the_values_of_the_library(folder: Path) -> None:
    adapted, theirs = lora_fx.rewrite(kept(folder), CONFIG), dequantized(folder)
    experts = stacks(adapted)
    assert {name.rpartition(".")[2] for name in experts} == {"gate_up_proj", "down_proj"}
    for name, stack in experts.items():
        exact = theirs.get_parameter(name).detach()
        assert stack.shape == exact.shape
        assert_same_bits(dense(stack), exact)
        assert_same_bits(dense(stack[1]), exact[1])
    sizes = {p.untyped_storage().nbytes() for s in experts.values() for p in s.parts.values()}
    assert max(sizes) <= max(stack.numel() for stack in experts.values())
    plan = lora_fx.plan(kept(folder), CONFIG)
    assert f"the base's weight in {folder.name} (transformers, blocks of" in str(plan)


def test_training_is_that_of_the_dequantized_model(folder: Path) -> None:
    adapted, exact = (
        randomize(lora_fx.rewrite(model, CONFIG), 0.1)
        for model in (kept(folder), dequantized(folder))
    )
    for model in (adapted, exact):
        model(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in exact.named_parameters() if p.requires_grad}
    assert sum("experts" in name for name in grads) == 4
    for name, grad in grads.items():
        assert_close(adapted.get_parameter(name).grad, grad, 1e-5)


def test_a_merge_writes_a_folder_that_loads_again(folder: Path, tmp_path: Path) -> None:
    adapted = randomize(lora_fx.rewrite(kept(folder), CONFIG), 0.1).eval()
    merged: Any = lora_fx.merge(adapted)
    merged.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        assert_close(merged(IDS).logits, adapted(IDS).logits, 1e-5)
        assert_same_bits(loaded(IDS).logits, merged(IDS).logits)
    again: Any = lora_fx.merge(adapted, requantize=True)
    again.save_pretrained(tmp_path / "again")
    before, after = (
        {key: (t.dtype, t.shape) for key, t in load_file(path / "model.safetensors").items()}
        for path in (folder, tmp_path / "again")
    )
    assert after == before
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == folder.name
    theirs, ours = (
        dequantized(tmp_path / "again"),
        lora_fx.rewrite(kept(tmp_path / "again"), CONFIG),
    )
    for name, stack in stacks(ours).items():
        exact = theirs.get_parameter(name).detach()
        assert_same_bits(dense(stack), exact)
        assert_same_bits(dense(again.get_parameter(name)), exact)
        # A block of MXFP4 may cut off 8 to 6; E4M3 has steps of 1/8.
        step = {"mxfp4": 0.25, "fp8": 0.04}[folder.name]
        assert (exact - merged.get_parameter(name)).abs().max() <= step * exact.abs().max()


def test_a_merge_that_changes_nothing_keeps_every_code(folder: Path, tmp_path: Path) -> None:
    again: Any = lora_fx.merge(lora_fx.rewrite(kept(folder), CONFIG), requantize=True)
    again.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    for name, tensor in before.items():
        if name.endswith("_blocks"):  # minus zero becomes zero
            low, high = (codes.where(codes != 8, 0) for codes in (tensor & 15, tensor >> 4))
            tensor = low | (high << 4)
        assert_same_bits(after[name].float(), tensor.float())


def test_copies_and_state_dicts_keep_the_weights(folder: Path) -> None:
    model: Any = lora_fx.rewrite(kept(folder), CONFIG).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    twins.append(lora_fx.rewrite(kept(folder), CONFIG).eval())
    for parameter in stacks(twins[-1]).values():
        for part in parameter.parts.values():
            part.zero_() if part.dtype == torch.uint8 else part.fill_(0.5)
    twins[-1].load_state_dict(model.state_dict())
    for twin in twins:
        with torch.no_grad():
            assert_same_bits(twin(IDS).logits, expected)


def test_a_file_has_the_stored_numbers(folder: Path, tmp_path: Path) -> None:
    adapted = randomize(lora_fx.rewrite(kept(folder), CONFIG), 0.1).eval()
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(adapted, path, (IDS,))
    session = ort.InferenceSession(path)
    for ids in (IDS, IDS[:1, :5]):
        out = session.run(None, {"input_ids": ids.numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(out, adapted(ids).logits, atol=2e-5)
    assert {entry.operator for entry in report.quantized} == {"DequantizeLinear"}
    assert {entry.scheme for entry in report.quantized} == {folder.name}
    assert sum(entry.weights for entry in report.quantized) >= 8


def test_the_table_of_transformers_is_as_before(folder: Path) -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    with lora_fx.keep_quantized():
        assert before != AUTO_QUANTIZER_MAPPING
    assert before == AUTO_QUANTIZER_MAPPING
    with pytest.raises(OSError, match="nowhere"), lora_fx.keep_quantized():
        AutoModelForCausalLM.from_pretrained(folder / "nowhere")
    assert before == AUTO_QUANTIZER_MAPPING


def test_a_dense_folder_is_loaded_as_usual(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, hidden_size=32, moe_intermediate_size=32, num_experts=4)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert not stacks(kept(tmp_path))


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj_blocks"))
    tensors[name] = tensors[name][:, :32].contiguous()
    tensors[name.replace("blocks", "scales")] = torch.zeros(4, 32, 3, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):
        kept(tmp_path)
    blocks, scales = torch.zeros(4, 32, 3, 16), torch.zeros(4, 32, 3)
    with pytest.raises(QuantizationError, match=r"down_proj has .* no MXFP4 of \[4, 96, 64\]"):
        mxfp4.stacked_experts("down_proj", blocks, scales, torch.zeros(4, 96, 64))


@pytest.mark.parametrize("exponent", [-8, 0, 5])
def test_values_of_mxfp4_are_rounded_to_the_nearest(exponent: int) -> None:
    torch.manual_seed(exponent)
    values = torch.randn(8, 64).double() * 2.0**exponent
    zeros = {"blocks": torch.zeros(8, 2, 16, dtype=torch.uint8)}
    zeros["scales"] = torch.zeros(8, 2, dtype=torch.uint8)
    old = mxfp4.MXFP4Tensor(Parts(zeros, (8, 64), None), torch.float32)
    again = dense(mxfp4.MXFP4Format().requantize(values, old)).double()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    blocks = values.reshape(8, 2, 32)
    smallest = 2.0 ** (blocks.abs().amax(-1).log2().floor() - 2)
    errors = []
    for steps in (smallest, smallest * 2):
        grid = torch.cat([-table, table]) * steps[..., None, None]
        errors.append((blocks[..., None] - grid).abs().amin(-1).square().sum(-1))
    found = (again.reshape(8, 2, 32) - blocks).square().sum(-1)
    assert_close(found, torch.minimum(*errors), 1e-6)
    assert quantization_of(mxfp4.MXFP4Format().requantize(values, old)).scheme == "mxfp4"


@pytest.mark.parametrize("how", ["a block ends with the gate", "cast"])
def test_experts_that_cannot_be_read_are_refused_by_name(how: str, tmp_path: Path) -> None:
    qwen3_moe(tmp_path, 224 if how != "cast" else 256)
    model = kept(tmp_path)
    if how == "cast":
        model.to(torch.bfloat16)  # the codes
    with pytest.raises(lora_fx.NoMatchError, match=r"gate_up_proj cannot be adapted: .*in FP8"):
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["q_proj", "gate_up_proj"]))
    plan = lora_fx.plan(model, lora_fx.LoraConfig(r=2, target_modules=["q_proj", "gate"]))
    assert all("experts" not in row.name for row in plan)
