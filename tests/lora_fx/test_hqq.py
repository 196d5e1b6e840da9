"""Layers of hqq: values, merges, state dicts and files, compared with the library."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.formats import dense, format_of, quantization_of
from lora_fx.formats.hqq import HqqTensor
from lora_fx.passes.graph import share_copy
from tests.formats import mixture
from tests.numerics import assert_same_bits
from tests.quantized import IDS, hqq_layer, llama

missing = pytest.mark.skipif(not importlib.util.find_spec("hqq"), reason="needs hqq")


def needs_library(test: Any) -> Any:
    """Mark a test that `make test-stacks STACKS=hqq` runs."""
    return pytest.mark.stack(missing(test))


FORMS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"nbits": bits} for bits in (1, 2, 3, 4, 5, 6, 8)},
    **{f"{bits} bits, axis 0": {"nbits": bits, "axis": 0} for bits in (2, 3, 4, 8)},
    "three values": {"nbits": 1.58},
    "groups of 8": {"group_size": 8},
    "8 bits, groups of 16": {"nbits": 8, "group_size": 16},
    "rows": {"group_size": None},
    "columns": {"group_size": None, "axis": 0},
    "two rows": {"group_size": 128},
    "one scale": {"channel_wise": False},
    "not optimized": {"optimize": False, "round_zero": True},
    "not optimized, 8 bits": {"nbits": 8, "optimize": False, "round_zero": True},
    "seen as floats": {"view_as_float": True},
}
every = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIG = lora_fx.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, seed=0)


def net(dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    """A model with a layer of the library, [96, 64], and a dense head."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 4)).to(dtype)
    layers[0] = hqq_layer(layers[0], **how)
    return layers


def rows(dtype: torch.dtype = torch.float32) -> Any:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_twin(base: Any) -> Any:
    """The same model with the library's values."""
    layer = nn.Linear(64, 96).to(base[0].compute_dtype)
    with torch.no_grad():
        layer.weight.copy_(base[0].dequantize())
        layer.bias.copy_(base[0].bias)
    return nn.Sequential(layer, *base[1:])


@needs_library
@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_library(form: dict[str, Any], dtype: torch.dtype) -> None:
    base = net(dtype, **form)
    values, before = base[0].dequantize(), {k: t.clone() for k, t in base.state_dict().items()}
    mine: Any = lora_fx.rewrite(base, CONFIG)
    weight: Any = mine[0]._parameters["weight"]
    assert_same_bits(dense(weight), values)
    quantization = quantization_of(weight)
    assert quantization is not None
    assert quantization.bits == math.ceil(form.get("nbits", 4))
    assert weight.W_q.data_ptr() == base[0].W_q.data_ptr()
    state = {key: tensor for key, tensor in mine.state_dict().items() if "lora_" not in key}
    assert state.keys() == before.keys()
    for key, tensor in before.items():
        assert_same_bits(base.state_dict()[key], tensor)
        if not form.get("view_as_float"):
            assert_same_bits(state[key], tensor)
    mine.load_state_dict(mine.state_dict())
    assert type(base[0]).__name__ == "HQQLinear"


@needs_library
@every
def test_gradients_are_those_of_the_dense_model(form: dict[str, Any]) -> None:
    base, x = net(**form), rows()
    plain = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4, target_modules=["0"]))
    torch.testing.assert_close(plain(x), base(x))
    mine, wanted = lora_fx.rewrite(base, CONFIG), lora_fx.rewrite(dense_twin(base), CONFIG)
    for model in (mine, wanted):
        model(x).square().sum().backward()
    pairs = zip(
        lora_fx.trainable_parameters(mine), lora_fx.trainable_parameters(wanted), strict=True
    )
    for factor, other in pairs:
        assert factor.grad is not None
        assert other.grad is not None
        assert float((factor.grad - other.grad).norm() / other.grad.norm()) < 1e-6
    merged: Any = lora_fx.merge(mine)
    assert_same_bits(merged[0].weight, lora_fx.merge(wanted)[0].weight)


@needs_library
@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_that_changes_nothing_keeps_the_numbers(
    form: dict[str, Any], dtype: torch.dtype
) -> None:
    mine: Any = lora_fx.rewrite(net(dtype, **form), lora_fx.LoraConfig(r=4, target_modules=["0"]))
    again: Any = lora_fx.merge(mine, requantize=True)
    for name, part in mine[0]._parameters["weight"].parts.items():
        assert_same_bits(again[0].weight.parts[name], part)


@needs_library
@every
def test_groups_get_the_scale_that_is_closer(form: dict[str, Any]) -> None:
    layer = hqq_layer(nn.Linear(64, 96), **form)
    weight: Any = share_copy(nn.Sequential(layer))[0].weight
    known = format_of(weight)
    assert known is not None
    torch.manual_seed(0)
    values = dense(weight).double()
    values[:48] += 0.2 * torch.randn(48, 64)
    again = dense(known.requantize(values, weight.data)).double()
    from_new = hqq_layer(_linear(values), **form)
    error = (again - values).square().sum()
    assert error <= (dense(weight) - values).square().sum()
    assert error <= (from_new.dequantize().double() - values).square().sum() * (1 + 1e-6)


def _linear(values: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(values.shape[1], values.shape[0])
    layer.weight = nn.Parameter(values.float())
    return layer


@needs_library
@every
def test_a_file_has_the_values(form: dict[str, Any], tmp_path: Path) -> None:
    base, x = net(**form), rows()
    mine = lora_fx.rewrite(base, CONFIG)
    report = lora_fx.export_onnx(mine, tmp_path / "model.onnx", x)
    (outputs,) = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu").run([x]).values()
    torch.testing.assert_close(outputs, mine(x).detach(), rtol=1e-5, atol=1e-5)
    assert report.verified
    (stored,) = report.quantized
    settings = mine[0]._parameters["weight"].options
    in_rows = settings.axis == 1 and settings.channel_wise and settings.group_size <= 64
    if in_rows and settings.nbits <= 4 and settings.group_size % 16 == 0:
        assert stored.operator == "MatMulNBits"
    elif in_rows and not settings.optimize:
        assert stored.operator == "DequantizeLinear"
    else:
        assert stored.operator == "Sub, Mul"


@needs_library
@every
def test_values_in_a_file_are_those_of_the_library(form: dict[str, Any], tmp_path: Path) -> None:
    model = share_copy(nn.Sequential(hqq_layer(nn.Linear(64, 96, bias=False), **form)))
    weight: Any = model[0].weight
    report = lora_fx.export_onnx(model, tmp_path / "model.onnx", torch.eye(64))
    session = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu")
    (values,) = session.run([torch.eye(64)]).values()
    if report.quantized[0].operator == "MatMulNBits":
        # It multiplies codes, up to 15, and zero points with the scale, rounds, and then subtracts.
        step = float(weight.scale.max())
        torch.testing.assert_close(values, dense(weight).T, rtol=0, atol=2 * 15 * 2**-24 * step)
    else:
        assert_same_bits(values, dense(weight).T.contiguous())


@needs_library
@pytest.mark.parametrize("form", [{}, {"nbits": 8}, {"axis": 0}], ids=["4", "8", "axis 0"])
def test_a_file_in_half_precision_has_the_values(form: dict[str, Any], tmp_path: Path) -> None:
    mine = lora_fx.rewrite(net(torch.float16, **form), CONFIG)
    report = lora_fx.export_onnx(mine, tmp_path / "model.onnx", rows(torch.float16))
    assert report.verified


@needs_library
@pytest.mark.parametrize("offload", [False, True], ids=["stored", "together"])
def test_quantized_scales_are_read(offload: bool) -> None:
    from hqq.core.quantize import BaseQuantizeConfig

    dense_layer, base = nn.Linear(64, 96), net()
    layer = base[0]
    config = BaseQuantizeConfig(
        nbits=4, group_size=16, quant_zero=True, quant_scale=True, offload_meta=offload
    )
    del config["offload_meta"]
    for name in ("scale_quant_params", "zero_quant_params"):
        config[name] |= {"axis": 1}
    del layer.W_q
    layer.quantize(dense_layer.weight.detach(), **config)  # as versions before 0.2.8 did
    if offload:  # which pins memory, and needs a GPU for that
        meta = layer.meta
        meta["zero_scale"] = torch.stack([meta.pop("zero_q"), meta.pop("scale_q")])
    mine: Any = lora_fx.rewrite(base, CONFIG)
    assert_same_bits(dense(mine[0]._parameters["weight"]), layer.dequantize())
    assert type(lora_fx.merge(mine, requantize=True)[0].weight) is HqqTensor


@needs_library
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"axis": 0}, r"scale: torch.float32 \[64, 1\] here, .* has torch.float32 \[1, 64\]"),
        ({"nbits": 5}, "nbits: 8 here, .* has 5"),
    ],
    ids=["axis", "bits"],
)
def test_a_state_dict_with_other_settings_is_refused(other: dict[str, Any], message: str) -> None:
    """The codes have the same dtype and shape."""
    layers = [hqq_layer(nn.Linear(64, 64), **{"nbits": 8, **how}) for how in (other, {})]
    first, second = (share_copy(nn.Sequential(layer)) for layer in layers)
    kept = dense(second[0].weight).clone()
    with pytest.raises(RuntimeError, match=f"0.weight is stored with {message}"):
        second.load_state_dict(first.state_dict())
    assert_same_bits(dense(second[0].weight), kept)
    parts = ("W_q", "scale", "zero", "bias")
    second.load_state_dict({f"0.{name}": second.state_dict()[f"0.{name}"] for name in parts})


@needs_library
def test_a_model_without_dense_weights_keeps_its_dtype() -> None:
    base = nn.Sequential(hqq_layer(nn.Linear(64, 96)), nn.Tanh(), hqq_layer(nn.Linear(96, 64)))
    config = lora_fx.LoraConfig(r=4, target_modules=["0", "2"])
    mine: Any = lora_fx.rewrite(base, config)
    assert mine[0]._parameters["weight"].dtype == mine[0].bias.dtype == torch.float32
    assert_same_bits(mine[0].bias, base[0].bias)
    torch.testing.assert_close(mine(rows()), base(rows()))


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_makes_the_weights_of_the_library(bits: int, dtype: torch.dtype) -> None:
    model: Any = llama(1).to(dtype)
    name = f"hqq{bits}"
    stored: Any = lora_fx.quantize(model, name)
    layers = {key for key, p in stored.named_parameters() if isinstance(p, HqqTensor)}
    assert len(layers) == 7
    for key in layers:
        reference: Any = hqq_layer(model.get_submodule(key.removesuffix(".weight")), nbits=bits)
        assert_same_bits(dense(stored.get_parameter(key)), reference.dequantize())
        written, owner = reference.state_dict(), key.removesuffix("weight")
        saved = {k: t for k, t in stored.state_dict().items() if k.startswith(owner)}
        assert saved.keys() == {f"{owner}{name}" for name in written}
        for part, tensor in written.items():
            assert_same_bits(saved[f"{owner}{part}"], tensor)


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plan_knows_the_bytes(bits: int) -> None:
    plan = lora_fx.plan_quantization(llama(1), f"hqq{bits}", block_size=32)
    stored = lora_fx.quantize(llama(1), f"hqq{bits}", block_size=32)
    weights: list[Any] = [p for p in stored.parameters() if isinstance(p, HqqTensor)]
    assert plan.bytes == sum(t.nbytes for p in weights for t in p.parts.values())


@needs_library
@pytest.mark.parametrize("bits", [3, 8])
def test_experts_are_stored_and_exported(bits: int, tmp_path: Path) -> None:
    model: Any = mixture()
    stored: Any = lora_fx.quantize(model, f"hqq{bits}")
    experts = model.model.layers[0].mlp.experts
    weight = stored.model.layers[0].mlp.experts.gate_up_proj
    for index, values in enumerate(experts.gate_up_proj.detach()):
        reference: Any = hqq_layer(_linear(values), nbits=bits)
        assert_same_bits(dense(weight)[index], reference.dequantize())
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = lora_fx.LoraConfig(r=4, target_parameters=parameters, init_lora_weights=False, seed=0)
    mine: Any = lora_fx.rewrite(stored, config)
    mine(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in lora_fx.trainable_parameters(mine))
    again: Any = lora_fx.merge(mine, requantize=True)
    fresh: Any = lora_fx.quantize(mixture(), f"hqq{bits}")
    fresh.load_state_dict(again.state_dict())
    assert_same_bits(fresh(IDS).logits.detach(), again(IDS).logits.detach())
    report = lora_fx.export_onnx(mine, tmp_path / "model.onnx", {"input_ids": IDS})
    assert report.verified
    assert {form.scheme for form in report.quantized} == {f"hqq{bits}"}


@needs_library
def test_the_library_loads_what_a_merge_returns(tmp_path: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    base: Any = llama(1)
    how: dict[str, Any] = {"compute_dtype": torch.float32, "device": "cpu"}
    AutoHQQHFModel.quantize_model(base, BaseQuantizeConfig(nbits=4), **how)
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, seed=0)
    again: Any = lora_fx.merge(lora_fx.rewrite(base, config), requantize=True)
    AutoHQQHFModel.save_quantized(again, str(tmp_path / "saved"))
    loaded: Any = AutoHQQHFModel.from_quantized(str(tmp_path / "saved"), **how)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "HQQLinear"
    torch.testing.assert_close(loaded(IDS).logits, again(IDS).logits)
    lora_fx.rewrite(loaded, config)


@needs_library
def test_a_model_is_compiled_and_copied() -> None:
    mine, x = lora_fx.rewrite(net(), CONFIG), rows()
    torch.testing.assert_close(torch.compile(mine)(x), mine(x))
    assert_same_bits(copy.deepcopy(mine)(x).detach(), mine(x).detach())


@needs_library
def test_layers_that_cannot_be_read_are_named_with_the_reason() -> None:
    from hqq.backends.torchao import HQQLinearTorchWeightOnlynt4
    from hqq.core.quantize import BaseQuantizeConfig

    patched = HQQLinearTorchWeightOnlynt4(None, BaseQuantizeConfig(nbits=4), initialize=False)
    patched.register_buffer("weight_int4pack", torch.zeros(8, 8, dtype=torch.int32))
    unpacked = hqq_layer(nn.Linear(64, 32), bitpack=False)
    model = nn.ModuleDict({"patched": patched, "unpacked": unpacked, "last": nn.Linear(64, 8)})
    model.forward = model["last"].forward
    text = str(lora_fx.plan(model, lora_fx.LoraConfig(r=4, target_modules=["last"])))
    assert "patched: a kernel of HQQ has repacked it" in text
    assert "unpacked.W_q: hqq.core.quantize.HQQLinear has codes that are not packed" in text


@needs_library
def test_groups_that_do_not_fill_a_byte_are_refused() -> None:
    """The library would lose them without an error."""
    model = nn.Sequential(nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 4))
    with pytest.raises(lora_fx.QuantizationError, match="0: HQQ stores 2 groups together, and it"):
        lora_fx.quantize(model, "hqq4")
    assert type(lora_fx.quantize(model, "hqq8")[0].weight) is HqqTensor


def test_the_library_is_not_imported() -> None:
    code = "import sys, lora_fx.formats; assert not [m for m in sys.modules if m.split('.')[0] == 'hqq']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extra_is_named_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(lora_fx.QuantizationError, match=r"'hqq4' needs hqq.*'lora-fx\[hqq\]'"):
        lora_fx.quantize(nn.Sequential(nn.Linear(64, 64)), "hqq4")
