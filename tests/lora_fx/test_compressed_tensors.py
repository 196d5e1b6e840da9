"""Checkpoints of compressed-tensors, as llm-compressor writes them: packed integers, FP8 and NVFP4."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_fx
from lora_fx.formats import dense, quantization_of
from lora_fx.formats.compressed_tensors import CompressedTensor
from lora_fx.passes.graph import share_copy
from tests.numerics import assert_same_bits

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor, compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def integers(bits: int, *, symmetric: bool, group: int | None = 32, **more: Any) -> Any:
    """A scheme for the weights of linear layers."""
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **how)
    return QuantizationScheme(targets=["Linear"], weights=weights, **more)


def floats(activations: dict[str, Any] | None, **how: Any) -> Any:
    """A scheme in FP8."""
    weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, **how)
    inputs = activations and QuantizationArgs(
        num_bits=8, type="float", symmetric=True, **activations
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


SCHEMES = {
    "W4A16": integers(4, symmetric=True),
    "W4A16, zero points": integers(4, symmetric=False),
    "W4A16, rows": integers(4, symmetric=True, group=None),
    "W8A16": integers(8, symmetric=True, group=64),
    "W3A16": integers(3, symmetric=True),
    "W8A8": integers(
        8,
        symmetric=True,
        group=None,
        input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
    ),
    "FP8, dynamic": floats({"strategy": "token", "dynamic": True}, strategy="channel"),
    "FP8, static": floats({"strategy": "tensor"}, strategy="tensor"),
    "FP8, blocks": floats(
        {"strategy": "group", "group_size": 32, "dynamic": True},
        strategy="block",
        block_structure=[32, 32],
    ),
    **{
        name: preset_name_to_scheme(name, ["Linear"])
        for name in ("NVFP4", "NVFP4A16", "MXFP4A16", "MXFP8A16")
    },
}
every = pytest.mark.parametrize("name", SCHEMES)
# transformers 5.24 makes the zero points of a model that it loads in another shape than the file has.
LOADED = [name for name in SCHEMES if "zero points" not in name]


def dense_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def configured(name: str) -> Any:
    """The configuration of a checkpoint."""
    return QuantizationConfig(config_groups={"group_0": SCHEMES[name]}, ignore=["lm_head"])


def compressed(model: Any, name: str) -> Any:
    """A copy with compressed weights, made by the library from the extremes of the weights."""
    result = copy.deepcopy(model)
    config = configured(name)
    apply_quantization_config(result, config, show_progress=False)
    for layer in result.modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            _compress(layer)
            config.format = layer.quantization_scheme.format
    config.quantization_status = "compressed"
    if hasattr(result, "config"):
        entry = {"quant_method": "compressed-tensors", **json.loads(config.model_dump_json())}
        result.config.quantization_config = entry
    return result


def _compress(layer: Any) -> None:
    args, weight = layer.quantization_scheme.weights, layer.weight.detach().float()
    strategy = args.strategy
    if strategy == "tensor":
        low, high = weight.aminmax()
    elif strategy == "channel":
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    elif strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    factor = None
    if strategy == "tensor_group":
        factor = generate_gparam(*weight.aminmax())
        layer.weight_global_scale.data = factor.reshape(layer.weight_global_scale.shape)
    scales, zeros = calculate_qparams(low, high, args, global_scale=factor)
    layer.weight_scale.data = scales.to(layer.weight_scale.dtype).reshape(layer.weight_scale.shape)
    if hasattr(layer, "weight_zero_point"):
        zero = layer.weight_zero_point
        zero.data = zeros.to(zero.dtype).reshape(zero.shape)
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.01)
    compress_module(layer)


def theirs(model: Any) -> Any:
    """The model that the library decompresses, without any rounding of activations."""
    result = copy.deepcopy(model)
    for layer in result.modules():
        if hasattr(layer, "quantization_scheme"):
            decompress_module(layer, leave_decompressed=False)
            layer.__dict__.pop("forward", None)
            for name in [k for k in layer._parameters if k not in ("weight", "bias")]:
                del layer._parameters[name]
    return result


def adapted(model: Any, **fields: Any) -> Any:
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, seed=0, **fields)
    return lora_fx.rewrite(model, config)


@every
def test_values_are_those_of_the_library(name: str) -> None:
    model = compressed(dense_llama(), name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mine, decompressed = adapted(model), theirs(model)
    weights = {k: p for k, p in mine.named_parameters() if quantization_of(p) is not None}
    assert len(weights) == 7
    for key, weight in weights.items():
        assert type(weight) is CompressedTensor
        assert_same_bits(dense(weight), decompressed.get_parameter(key).detach())
    assert_same_bits([*model.state_dict().values()], [*before.values()])
    state = lora_fx.merge(mine, requantize=True).state_dict()
    assert {k: (t.dtype, t.shape) for k, t in state.items()} == {
        k: (t.dtype, t.shape) for k, t in before.items()
    }


@every
def test_a_merge_that_changes_nothing_keeps_scales_and_values(name: str) -> None:
    model = compressed(dense_llama(), name)
    mine = lora_fx.rewrite(model, lora_fx.LoraConfig(r=4))
    again: Any = lora_fx.merge(mine, requantize=True)
    for key, weight in mine.named_parameters():
        if isinstance(weight, CompressedTensor):
            merged = again.get_parameter(key)
            assert_same_bits(dense(merged), dense(weight))
            assert_same_bits(merged.weight_scale.float(), weight.weight_scale.float())


@every
def test_gradients_are_those_of_the_dense_model(name: str) -> None:
    model = compressed(dense_llama(), name)
    mine, wanted = adapted(model), adapted(theirs(model))
    grads = []
    for one in (mine.float(), wanted.float()):
        one(IDS).logits.square().sum().backward()
        grads.append({k: p.grad for k, p in one.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert float((grad - grads[1][key]).norm() / grad.norm()) < 1e-6, key


@every
def test_no_values_are_kept_for_the_backward_pass(name: str) -> None:
    mine = adapted(
        compressed(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), name),
        target_modules=["0"],
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = mine(torch.randn(2, 64, requires_grad=True))
    out.sum().backward()
    assert kept
    assert sum(t.nbytes for t in kept if t.numel() >= 64 * 128) == 0


@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_is_trained_on_and_loads_again(name: str, tmp_path: Path) -> None:
    compressed(dense_llama(), name).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mine = adapted(base)
    assert sum(isinstance(p, CompressedTensor) for p in mine.parameters()) == 7
    mine(IDS)
    assert sum(isinstance(p, CompressedTensor) for p in mine.parameters()) == 7

    again: Any = lora_fx.merge(mine, requantize=True)
    again.save_pretrained(tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in written.items()} == {
        k: (t.dtype, t.shape) for k, t in tensors.items()
    }
    how = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=how)
    assert_same_bits(again(IDS).logits.detach(), loaded(IDS).logits.detach())

    merged: Any = lora_fx.merge(mine)
    merged.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert loaded.dtype == torch.bfloat16
    assert set(loaded.state_dict()) == set(dense_llama().state_dict())
    assert_same_bits(merged(IDS).logits.detach(), loaded(IDS).logits.detach())


def test_zero_points_are_loaded_by_the_library(tmp_path: Path) -> None:
    name = "W4A16, zero points"
    compressed(dense_llama(), name).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    storage = QuantizationConfig.model_validate(config.quantization_config)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    apply_quantization_config(model, storage, show_progress=False)
    ModelCompressor(quantization_config=storage).compress_model(model)
    model.load_state_dict(tensors)
    mine = adapted(model)
    assert sum(isinstance(p, CompressedTensor) for p in mine.parameters()) == 7
    assert "ct_decompress_hook" not in vars(mine)
    original = theirs(compressed(dense_llama(), name))
    for key, weight in mine.named_parameters():
        if quantization_of(weight) is not None:
            assert_same_bits(dense(weight), original.get_parameter(key).detach())
    lora_fx.merge(mine, requantize=True).save_pretrained(tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in written.items()} == {
        k: (t.dtype, t.shape) for k, t in tensors.items()
    }


def test_what_else_is_compressed_is_still_decompressed_on_the_first_call() -> None:
    config = configured("W8A16")
    config.config_groups["group_0"].targets = ["Linear", "Embedding"]
    model = dense_llama()
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            _compress(layer)
    ModelCompressor(quantization_config=config).add_decompress_hook(model)
    mine = adapted(model)
    assert sum(isinstance(p, CompressedTensor) for p in mine.parameters()) == 7
    assert_same_bits(mine(IDS).logits, mine(IDS).logits)
    assert sum(isinstance(p, CompressedTensor) for p in mine.parameters()) == 7


ONNX = {
    "W4A16": ("MatMulNBits", 5.1),
    "W4A16, zero points": ("MatMulNBits", 5.2),
    "W4A16, rows": ("MatMulNBits", 6.1),
    "W8A16": ("DequantizeLinear", 8.6),
    "W3A16": ("DequantizeLinear", 9.1),
    "W8A8": ("DequantizeLinear", 8.6),
    "FP8, dynamic": ("DequantizeLinear", 8.6),
    "FP8, static": ("DequantizeLinear", 8.6),
    "FP8, blocks": ("DequantizeLinear", 9.1),
    "MXFP4A16": ("DequantizeLinear", 9.1),
    "MXFP8A16": ("DequantizeLinear", 9.1),
}


@pytest.mark.parametrize("name", ONNX)
def test_an_onnx_file_has_the_integers(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(128, 64, bias=False))
    model = compressed(net, name)
    report = lora_fx.export_onnx(share_copy(model), tmp_path / "model.onnx", torch.eye(128))
    (found,) = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu").run([torch.eye(128)]).values()
    assert_same_bits(found, theirs(model)[0].weight.detach().float().T)
    (weight,) = report.quantized
    operator, bits = ONNX[name]
    assert weight.operator == operator
    assert weight.bits <= bits


def test_nvfp4_has_no_operator(tmp_path: Path) -> None:
    model = adapted(compressed(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8)), "NVFP4"))
    with pytest.raises(lora_fx.ExportError, match="which the library rounds to half precision"):
        lora_fx.export_onnx(model, tmp_path / "model.onnx", torch.eye(128))


def test_it_is_prepared_for_training() -> None:
    model = compressed(dense_llama(), "W4A16")
    prepared: Any = lora_fx.prepare_for_kbit_training(model)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert sum(isinstance(p, CompressedTensor) for p in prepared.parameters()) == 7
    assert prepared(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["W4A16, zero points", "W3A16", "FP8, dynamic", "NVFP4"])
def test_it_is_planned_copied_and_compiled(name: str) -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model = compressed(net, name)
    plan = lora_fx.plan(model, lora_fx.LoraConfig(r=4, target_modules=["0", "2"]))
    assert "(compressed-tensors, " in str(plan)
    mine = adapted(model, target_modules=["0", "2"])
    x = torch.randn(3, 64)
    expected = mine(x)
    assert_same_bits(copy.deepcopy(mine)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
