"""FP8 with block scales: the layers of transformers, and files that it loads again."""

from __future__ import annotations

import io
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Linear,
    Fp8Quantize,
    replace_with_fp8_linear,
)

import lora_fx
from lora_fx.formats import dense, quantization_of
from lora_fx.passes.graph import share_copy
from tests.numerics import assert_same_bits
from tests.quantized import fp8_layer

# 320 is no multiple of 128, as the 576 rows of a projection of DeepSeek-V3.
FORMS = {
    "blocks": ((128, 128), "float", (256, 384)),
    "cut blocks": ((128, 128), "float", (320, 192)),
    "powers of two": ((128, 128), "ue8m0", (256, 128)),
    "no blocks": (None, "float", (96, 64)),
    "rows": ((1, 32), "float", (64, 96)),
}
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
FIRST = lora_fx.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, seed=0)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    """Block, kind of scales, and [out, in]."""
    return FORMS[request.param]


def linear(form: Any) -> Any:
    """A layer of transformers, with a bias."""
    block, scale_fmt, (out_features, in_features) = form
    torch.manual_seed(0)
    return fp8_layer(nn.Linear(in_features, out_features), block, scale_fmt)


def by_hand(layer: Any) -> Tensor:
    """The values of a layer in fp64."""
    codes, scales = layer.weight.detach().double(), layer.weight_scale_inv.detach().double()
    block = layer.block_size or codes.shape
    scales = scales.reshape(-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes * spread[: codes.shape[0], : codes.shape[1]]


def test_values_are_those_of_the_library(form: Any) -> None:
    layer = linear(form)
    adopted = share_copy(layer)
    values = dense(adopted.weight, torch.float32)
    # The product of a code of 4 bits and a scale of 24 is rounded once.
    assert_same_bits(values, by_hand(layer).float())
    try:
        theirs = Fp8Dequantize(None).convert(
            {"weight": layer.weight.detach(), "weight_scale_inv": layer.weight_scale_inv.detach()}
        )["weight"]
    except ValueError:  # it reads no blocks that the matrix cuts
        assert form is FORMS["cut blocks"]
    else:
        assert_same_bits(values.to(theirs.dtype), theirs)
    assert type(adopted) is FP8Linear
    assert type(layer.weight) is nn.Parameter
    assert adopted.weight.parts["weight"].data_ptr() == layer.weight.data_ptr()


def test_gradients_are_those_of_the_dense_model(form: Any) -> None:
    base = nn.Sequential(linear(form))
    adapted = lora_fx.rewrite(base, FIRST)
    plain = nn.Sequential(nn.Linear(base[0].in_features, base[0].out_features))
    plain[0].weight.data, plain[0].bias.data = by_hand(base[0]).float(), base[0].bias.detach()
    wanted = lora_fx.rewrite(plain, FIRST)
    x = torch.randn(5, base[0].in_features)
    grads = []
    for model in (adapted, wanted):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        grads.append([given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for found, expected in zip(*grads, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_no_values_are_kept_for_the_backward_pass() -> None:
    base = nn.Sequential(
        linear(FORMS["blocks"]), nn.Tanh(), linear(((128, 128), "float", (64, 256)))
    )
    # The second layer has no adapter: its own forward must not keep its values, either.
    model = lora_fx.rewrite(base, FIRST)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(torch.randn(2, 384, requires_grad=True))
    out.sum().backward()
    assert kept
    assert sum(t.nbytes for t in kept if t.numel() >= 64 * 256) == 0


def encoder(block: Any, scale_fmt: str) -> Any:
    """The encoder of transformers."""
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    return Fp8Quantize(types.SimpleNamespace(quantization_config=config))


def test_a_merge_has_the_values_in_bf16_or_the_library_s_codes(form: Any) -> None:
    base = nn.Sequential(linear(form))
    model = lora_fx.rewrite(base, FIRST)
    a, b = (f.default.detach().double() for f in (model[0].lora_A, model[0].lora_B))
    exact = by_hand(base[0]).float().double() + 2 * b @ a
    merged = lora_fx.merge(model, dtype=torch.bfloat16)
    assert type(merged[0]) is nn.Linear
    assert set(merged.state_dict()) == {"0.weight", "0.bias"}
    assert not hasattr(merged[0], "block_size")
    # Rounded once, to half of the last bit. ``exact.to(torch.bfloat16)`` rounds to fp32 first.
    half = torch.ldexp(torch.tensor(1.0).double(), exact.frexp().exponent - 9)
    assert merged[0].weight.dtype == torch.bfloat16
    assert bool(((merged[0].weight.detach().double() - exact).abs() <= half).all())

    again: Any = lora_fx.merge(model, requantize=True)
    assert type(again[0]) is FP8Linear
    assert quantization_of(again[0].weight) == quantization_of(model[0].weight)
    state = again.state_dict()
    assert set(state) == {"0.weight", "0.weight_scale_inv", "0.bias"}
    block, scale_fmt, shape = form
    if all(size % of == 0 for size, of in zip(shape, block or shape, strict=True)):
        # The adapter is large: nothing is in the range of the old scales.
        theirs = encoder(block, scale_fmt).convert({"weight": exact})
        scales = theirs["weight_scale_inv"].reshape(state["0.weight_scale_inv"].shape)
        grown = scales.float() > base[0].weight_scale_inv.detach().float()
        assert_same_bits(state["0.weight_scale_inv"].float()[grown], scales.float()[grown])
        if bool(grown.all()):
            found, expected = state["0.weight"], theirs["weight"]
            assert_same_bits(found.view(torch.uint8), expected.view(torch.uint8))
    # Four bits of mantissa, with the implicit one: 1/16 of each value, or less.
    off = (dense(again[0].weight).double() - exact).abs()
    largest = exact.abs().max()
    assert bool((off <= exact.abs() / 16 + largest / 448 / 2**9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_that_changes_nothing_keeps_every_code(form: Any, dtype: torch.dtype) -> None:
    base = nn.Sequential(linear(form))
    base[0].bias.data = base[0].bias.data.to(dtype)  # so are the values
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4, target_modules=["0"]))
    state = lora_fx.merge(model, requantize=True).state_dict()
    for name in ("weight", "weight_scale_inv"):
        kept, original = state[f"0.{name}"], base[0].get_parameter(name).detach()
        assert_same_bits(kept.float(), original.float())


def test_what_has_no_adapter_keeps_its_codes() -> None:
    base = nn.Sequential(linear(FORMS["blocks"]), linear(((128, 128), "float", (64, 256))))
    model = lora_fx.rewrite(base, FIRST)
    state = lora_fx.merge(model, requantize=True).state_dict()
    for name in ("weight", "weight_scale_inv"):
        kept, original = state[f"1.{name}"], base[1].get_parameter(name).detach()
        assert_same_bits(kept.view(torch.uint8), original.view(torch.uint8))


# --- files -------------------------------------------------------------------------------------------


def llama() -> Any:
    """A Llama with layers of FP8 on a CPU, where ``from_pretrained`` would dequantize them."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    how = FineGrainedFP8Config(weight_block_size=(64, 64))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, fp8_layer(layer, (64, 64)))
    model.config.quantization_config = how
    return model


def test_a_checkpoint_is_trained_on_and_loads_again(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    how = FineGrainedFP8Config(**config.quantization_config)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    replace_with_fp8_linear(model, ["lm_head"], how)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    model.load_state_dict(tensors, assign=True)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(target_modules="all-linear"))
    layers = {name: p for name, p in adapted.named_parameters() if quantization_of(p)}
    assert len(layers) == 7
    for name, weight in layers.items():
        assert_same_bits(dense(weight), theirs.get_parameter(name).detach())

    again: Any = lora_fx.merge(adapted, requantize=True)
    again.save_pretrained(tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in written.items()} == {
        k: (t.dtype, t.shape) for k, t in tensors.items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for name in layers:
        assert_same_bits(dense(again.get_parameter(name)), loaded.get_parameter(name).detach())
    assert_same_bits(again(IDS).logits.detach(), loaded(IDS).logits.detach())

    merged: Any = lora_fx.merge(adapted)
    merged.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same_bits(merged(IDS).logits.detach(), loaded(IDS).logits.detach())


def test_a_model_can_be_pickled(form: Any) -> None:
    model = lora_fx.rewrite(nn.Sequential(linear(form)), FIRST)
    again = pickle.loads(pickle.dumps(model))
    weight, old = again[0].weight, model[0].weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert type(weight) is type(old)
    assert_same_bits(dense(weight), dense(old))
    x = torch.randn(3, form[2][1])
    assert_same_bits(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert_same_bits(torch.load(stream, weights_only=False)(x), model(x))


def test_a_state_dict_loads_into_a_rewritten_model_and_a_wrong_one_does_not() -> None:
    model = lora_fx.rewrite(nn.Sequential(linear(FORMS["blocks"])), FIRST)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = dense(model[0].weight).clone()
    state["0.weight_scale_inv"] *= 2
    model.load_state_dict(state)
    assert_same_bits(dense(model[0].weight), before * 2)
    with pytest.raises(RuntimeError, match=r"0\.weight is stored with weight_scale_inv: .*no such"):
        model.load_state_dict({k: t for k, t in state.items() if "scale" not in k})
    state["0.weight"] = before
    with pytest.raises(RuntimeError, match=r"weight: torch\.float8_e4m3fn .*torch\.float32"):
        model.load_state_dict(state)


def test_an_onnx_file_has_the_values(form: Any, tmp_path: Path) -> None:
    layer = linear(form)
    layer.bias = None
    inputs = torch.eye(layer.in_features)
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(nn.Sequential(share_copy(layer)), path, inputs)
    (found,) = lora_fx.OnnxSession(path, "cpu").run([inputs]).values()
    assert_same_bits(found, by_hand(layer).float().T)
    (weight,) = report.quantized
    assert (weight.scheme, weight.operator) == ("fp8", "DequantizeLinear")


# --- refusals ----------------------------------------------------------------------------------------


def test_experts_in_four_bits_are_refused_by_name() -> None:
    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=97,
        num_experts=4,
    )
    model = Qwen3MoeForCausalLM(config)
    replace_with_fp8_linear(model, ["lm_head", "gate"], FineGrainedFP8Config(expert_dtype="fp4"))
    model.to_empty(device="cpu")
    plan = lora_fx.plan(model, lora_fx.LoraConfig(r=4, target_modules=["q_proj", "gate"]))
    assert {row.site.name.rpartition(".")[2] for row in plan.sites} == {"q_proj", "gate"}
    refused = {one.name.rpartition(".")[2]: one.reason for one in plan.rejections}
    assert set(refused) == {"gate_up_proj", "down_proj"}
    assert all("FineGrainedFP8Config(dequantize=True)" in text for text in refused.values())
    with pytest.raises(lora_fx.NoMatchError, match="only FP8Linear and experts"):
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=4, target_parameters=["gate_up_proj"]))


def test_codes_that_were_cast_are_refused() -> None:
    model = nn.Sequential(linear(FORMS["blocks"])).to(torch.bfloat16)
    with pytest.raises(lora_fx.NoMatchError, match="it is quantized"):
        lora_fx.rewrite(model, FIRST)
