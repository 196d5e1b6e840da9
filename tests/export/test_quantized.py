"""Models over quantized weights: the file has their values to the last bit, in few bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx.formats import dense, format_of, quantization_of
from tests.quantized import IDS, SCHEMES, llama, quantized

# No operator has the values of nf4 of torchao, and MatMulNBits rounds twice for the zero points of hqq.
EXACT = [scheme for scheme in SCHEMES if scheme not in ("nf4 torchao", "hqq4")]
OPERATORS = {
    "nf4": "MatMulBnb4",
    "fp4": "MatMulBnb4",
    "int4": "MatMulNBits",
    "int8": "DequantizeLinear",
    "fp8": "DequantizeLinear",
}
BITS = {"nf4": 4.5, "fp4": 4.5, "int4": 5.125, "int8": 8.5, "fp8": 9.0}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(128, 64)
        self.down = nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def exported(model: nn.Module, folder: Path, inputs: Any, **options: Any) -> Any:
    report = lora_fx.export_onnx(model, folder / "model.onnx", inputs, force=True, **options)
    return report, lora_fx.OnnxSession(folder / "model.onnx", "cpu")


def only(outputs: dict[str, Tensor]) -> Tensor:
    (value,) = outputs.values()
    return value


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize("scheme", EXACT)
def test_a_file_has_the_values_of_the_library(scheme: str, tmp_path: Path) -> None:
    model = quantized(nn.Sequential(nn.Linear(128, 64, bias=False)), scheme)
    weight = copy.deepcopy(model)[0].weight
    # gptqmodel rounds values to half precision, and the file does not.
    values = dense(format_of(weight).widened(weight), torch.float32)
    report, session = exported(model, tmp_path, torch.eye(128))
    assert torch.equal(only(session.run([torch.eye(128)])), values.T)
    (form,) = report.quantized
    kind = scheme.split()[0]
    assert (form.scheme, form.operator, form.values) == (kind, OPERATORS[kind], 128 * 64)
    assert form.bits <= BITS[kind]
    if BITS[kind] < 5:
        assert form.of_fp16 < 0.3
    assert report.metadata["lora_fx.quantized"] == session.metadata["lora_fx.quantized"]
    assert json.loads(session.metadata["lora_fx.quantized"])[0]["operator"] == OPERATORS[kind]
    assert f"1 weight in {kind}, {'a scale a row' if kind == 'int8' else 'blocks of'}" in str(
        report
    )


@pytest.mark.parametrize("scheme", ["nf4 double", "int8 bitsandbytes"])
def test_a_quantized_llama_is_what_its_library_computes(scheme: str, tmp_path: Path) -> None:
    model = quantized(llama(1), scheme).train()
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        want = model(IDS).logits
    report, session = exported(model, tmp_path, {"input_ids": IDS})
    assert close(session.run({"input_ids": IDS})["logits"], want)
    assert report.max_rel_error < 1e-4
    assert report.quantized[0].weights == 7
    assert report.dtype == "fp32"
    assert report.verified
    # LLM.int8() rounds the input of a product, too, once it does not train; a file has weights only.
    assert "over the values of its quantized weights" in report.reference
    # What was given is as it was.
    assert [type(module) for module in model.modules()] == kinds
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize(
    ("scheme", "use_dora"),
    [("nf4 double", True), ("int4 torchao", False), ("int8 bitsandbytes", True)],
)
def test_adapters_stay_beside_quantized_weights(
    scheme: str, use_dora: bool, tmp_path: Path
) -> None:
    base = quantized(Mlp(), scheme).train()
    config = lora_fx.LoraConfig(r=4, use_dora=use_dora, init_lora_weights=False)
    model = lora_fx.rewrite(base, config).train()
    x = torch.randn(5, 128)
    with torch.no_grad():
        want = model(x)
    report, session = exported(model, tmp_path, x)
    assert report.adapters == "inline"
    assert "lora_fx.inline" in report.metadata
    assert report.quantized[0].weights == 2
    assert "beside the operations" in str(report)
    assert close(only(session.run([x])), want)


def test_inline_adapters_of_a_dense_model(tmp_path: Path) -> None:
    config = lora_fx.LoraConfig(r=4, use_dora=True, init_lora_weights=False)
    model = lora_fx.rewrite(Mlp(), config)
    x = torch.randn(5, 128)
    report, session = exported(model, tmp_path, x, adapters="inline")
    assert close(only(session.run([x])), model(x).detach())
    merged, _ = exported(model, tmp_path, x)
    assert (report.adapters, merged.adapters) == ("inline", "merge")
    assert merged.initializers < report.initializers


def test_several_inline_adapters_and_what_one_trains_in_full(tmp_path: Path) -> None:
    base = quantized(nn.ModuleDict({"mlp": Mlp(), "head": nn.Linear(128, 5)}), "nf4")
    base = Headed(base["mlp"])
    model = lora_fx.rewrite(
        base,
        lora_fx.LoraConfig(
            r=4, init_lora_weights=False, target_modules=["up"], modules_to_save=["head"]
        ),
    )
    lora_fx.add_adapter(
        model,
        lora_fx.LoraConfig(r=2, init_lora_weights=False, target_modules=["down"]),
        adapter_name="second",
    )
    lora_fx.set_adapter(model, ["default", "second"])
    with torch.no_grad():
        model.get_parameter("head.weight").add_(0.1)
    x = torch.randn(5, 128)
    _, session = exported(model, tmp_path, x)
    assert close(only(session.run([x])), model(x).detach())


class Headed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("format_name", ["nf4", None])
def test_inline_dora_inside_a_joined_attention_layer(
    format_name: str | None, tmp_path: Path
) -> None:
    model = Attends().eval()
    base = model if format_name is None else lora_fx.quantize(model, format_name)
    config = lora_fx.LoraConfig(r=2, use_dora=True, init_lora_weights=False)
    adapted = lora_fx.rewrite(base, config)
    x = torch.randn(2, 3, 32)
    _, session = exported(adapted, tmp_path, x, adapters="inline")
    with torch.no_grad():
        assert close(only(session.run(x)), adapted(x))
        assert not close(adapted(x), base(x))


def test_a_merge_makes_the_weights_dense(tmp_path: Path) -> None:
    model = lora_fx.rewrite(
        quantized(Mlp(), "nf4"), lora_fx.LoraConfig(r=4, init_lora_weights=False)
    )
    x = torch.randn(5, 128)
    report, session = exported(model, tmp_path, x, adapters="merge")
    assert not report.quantized
    assert close(only(session.run([x])), model(x).detach())


@pytest.mark.parametrize("scheme", ["nf4 double", "int4 torchao", "int8 torchao"])
def test_adapters_are_swapped_over_quantized_weights(scheme: str, tmp_path: Path) -> None:
    base = quantized(Mlp(), scheme).train()
    config = lora_fx.LoraConfig(
        r=4, use_dora=True, init_lora_weights=False, target_modules=["up", "down"]
    )
    model = lora_fx.rewrite(base, config).train()
    x = torch.randn(5, 128)
    with torch.no_grad():
        want, plain = model(x), base(x)
    report, session = exported(model, tmp_path, x, adapters="inputs")
    assert report.swappable == ("up", "down")
    assert report.quantized[0].weights == 2
    lora_fx.save_onnx_adapter(model, tmp_path / "a.onnx_adapter", base=tmp_path / "model.onnx")
    session.load_adapter("a", tmp_path / "a.onnx_adapter")
    assert close(only(session.run([x])), plain)
    assert close(only(session.run([x], adapter="a")), want)


def test_a_plain_quantized_model_takes_adapters(tmp_path: Path) -> None:
    base = quantized(Mlp(), "nf4").train()
    x = torch.randn(5, 128)
    _, session = exported(base, tmp_path, x, adapters="inputs")
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=3, init_lora_weights=False)).train()
    lora_fx.save_adapter(model, tmp_path / "adapter")
    session.load_adapter("a", tmp_path / "adapter")
    with torch.no_grad():
        want = model(x)
    assert close(only(session.run([x], adapter="a")), want)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=97,
        n_positions=32,
        n_inner=64,
        bos_token_id=0,
        eos_token_id=96,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_over_a_quantized_base(family: str, tmp_path: Path) -> None:
    base = quantized(llama(1), "nf4") if family == "llama" else lora_fx.quantize(gpt2(), "int4")
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4, init_lora_weights=False)).eval()
    prompt = IDS[:, :5]
    report, session = exported(model, tmp_path, prompt, task="text-generation")
    assert report.quantized
    want = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(session.generate(prompt, max_new_tokens=8), want)


@pytest.mark.parametrize("scheme", ["nf4", "int4 torchao", "int8 torchao"])
def test_a_half_file_over_a_quantized_base(scheme: str, tmp_path: Path) -> None:
    x = torch.randn(5, 128)
    model = quantized(Mlp(), scheme).train()
    with torch.no_grad():
        want = model(x)
    report, session = exported(model, tmp_path, x, dtype="fp16")
    assert report.dtype == "fp16"
    assert report.quantized
    assert close(only(session.run([x.half()])).float(), want, 1e-2)


def test_scales_that_half_precision_has_no_digits_for_stay_fp32(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        plain[0].weight.mul_(1e-5)
    model = quantized(plain, "nf4")
    _, session = exported(model, tmp_path, torch.eye(64), dtype="fp16")
    got = only(session.run([1024 * torch.eye(64).half()])).float()
    assert close(got, 1024 * dense(model[0].weight).T, 1e-3)


def test_the_values_are_those_of_the_codes_whatever_they_are_rounded_to(tmp_path: Path) -> None:
    # The model computes in bf16; its codes and fp32 scales stand for more digits.
    model = quantized(Mlp().to(torch.bfloat16), "nf4")
    x = torch.randn(5, 128)
    report, session = exported(model, tmp_path, x, dtype="fp32")
    assert (report.dtype, report.parity[0].tolerance) == ("fp32", 1e-4)
    with torch.no_grad():
        want = model.train()(x.to(torch.bfloat16)).float()
    assert close(only(session.run([x])), want, 2e-2)


def intx(bits: int, granularity: Any, symmetric: bool = True) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.quant_primitives import MappingType

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 24, bias=False))
    with torch.no_grad():
        model[0].weight.add_(0.02)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    dtype = torch.int4 if bits == 4 else torch.int8
    config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, mapping_type=mapping)
    quantize_(model, config)
    return model


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "operator"),
    [
        (4, None, False, "MatMulNBits"),  # a row is no whole number of blocks
        (4, 24, True, "DequantizeLinear"),  # nor is a group
        (8, None, False, "DequantizeLinear"),
        (8, 24, False, "DequantizeLinear"),
    ],
)
def test_blocks_of_every_size(
    bits: int, group: int | None, symmetric: bool, operator: str, tmp_path: Path
) -> None:
    from torchao.quantization import PerAxis, PerGroup

    model = intx(bits, PerGroup(group) if group else PerAxis(0), symmetric)
    values = dense(model[0].weight)
    report, session = exported(model, tmp_path, torch.eye(72))
    assert report.quantized[0].operator == operator
    assert torch.equal(only(session.run([torch.eye(72)])), values.T)


class Products(nn.Module):
    """A weight that is multiplied in every way in which code does it, and one that two places share."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.again = nn.Linear(64, 64)
        self.again.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 64)
        products = x @ self.weight.T, torch.matmul(x, self.weight.t()), F.linear(x, self.weight)
        added = torch.addmm(self.again.bias, flat, self.weight.transpose(0, 1)).view(x.shape)
        return sum(products) + added + self.again(x)


def test_products_in_functional_code(tmp_path: Path) -> None:
    layer = quantized(nn.Sequential(nn.Linear(64, 64)), "int8 torchao")[0]
    model = Products(layer.weight)
    x = torch.randn(2, 3, 64)
    weight, bias = dense(layer.weight), model.again.bias.detach()
    report, session = exported(model, tmp_path, x)
    assert close(only(session.run([x])), 5 * x @ weight.T + 2 * bias)
    assert report.quantized[0].weights == 1


@pytest.mark.parametrize("opset", [18, 24])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    model = nn.ModuleList([quantized(Mlp(), scheme) for scheme in ("nf4", "int8 torchao")])
    model = nn.Sequential(*model)
    x = torch.randn(2, 3, 128)
    report, _ = exported(model, tmp_path, x, opset=opset)
    assert report.verified
    assert len(report.quantized) == 2


def test_weights_in_files_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(*(quantized(Mlp(), scheme) for scheme in EXACT))
    x = torch.randn(3, 128)
    report, session = exported(model, tmp_path, x, external_data_bytes=0)
    assert report.data_files
    mapped = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu", low_memory=True)
    assert close(only(mapped.run([x])), only(session.run([x])))


def test_an_input_of_one_axis(tmp_path: Path) -> None:
    model = quantized(nn.Sequential(nn.Linear(128, 64)), "int8 torchao")
    x = torch.randn(128)
    _, session = exported(model, tmp_path, x)
    assert close(
        only(session.run([x])), F.linear(x, dense(model[0].weight), model[0].bias.detach())
    )


def refused(model: nn.Module, folder: Path, inputs: Any) -> str:
    with pytest.raises(lora_fx.ExportError) as caught:
        lora_fx.export_onnx(model, folder / "model.onnx", inputs)
    assert not list(folder.iterdir())
    return str(caught.value)


def test_a_table_that_no_operator_has_is_refused(tmp_path: Path) -> None:
    text = refused(quantized(Mlp(), "nf4 torchao"), tmp_path, torch.randn(5, 128))
    assert "'up.weight'" in text
    assert "four digits" in text
    assert "lora_fx.merge" in text


def test_another_use_of_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.mul(self.layer.weight, 2))

    layer = quantized(nn.Sequential(nn.Linear(64, 64)), "int8 torchao")[0]
    text = refused(Doubled(layer), tmp_path, torch.randn(5, 64))
    assert "'layer.weight'" in text
    assert "mul reads it" in text


def test_a_weight_that_is_not_quantized_yet_is_refused(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    assert "Params4bit" in refused(model, tmp_path, torch.randn(5, 64))


def test_blocks_that_a_kernel_mixes_up_are_refused(tmp_path: Path) -> None:
    from bitsandbytes.functional import get_4bit_type

    # bitsandbytes quantizes a matrix as one row of blocks. Its CPU kernel (0.50) begins with each row anew.
    model = quantized(nn.Sequential(nn.Linear(96, 64, bias=False)), "nf4")
    weight: Any = model[0].weight
    codes = torch.stack([weight.data >> 4, weight.data & 15], -1).flatten().long()
    blocks = get_4bit_type("nf4", device="cpu")[codes].view(-1, 64)
    stored = (blocks * weight.quant_state.absmax[:, None]).view(64, 96)
    if not torch.equal(dense(weight), stored):
        assert "rows of 96 values in blocks of 64" in refused(model, tmp_path, torch.eye(96))
        return
    _, session = exported(model, tmp_path, torch.eye(96))
    assert torch.equal(only(session.run([torch.eye(96)])), stored.T)


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = quantized(Mlp(), "nf4")
    model.up.weight.quant_state.absmax[3] = torch.nan
    text = refused(model, tmp_path, torch.randn(5, 128))
    assert "'up.weight' has scales that are not finite" in text


def test_the_argument_is_not_changed(tmp_path: Path) -> None:
    model = quantized(Mlp(), "nf4 double")
    state, before = model.up.weight.quant_state, copy.deepcopy(model.state_dict())
    exported(model, tmp_path, torch.randn(5, 128), dtype="fp16")
    assert model.up.weight.quant_state is state
    assert state.dtype == torch.float32
    assert quantization_of(model.up.weight) is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
