"""Merging over a quantized base: into a dense model, or into the same format again."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_fx
from lora_fx import LoraConfig
from lora_fx.formats import dense, quantization_of, requantized
from tests.numerics import assert_same_bits
from tests.quantized import IDS, SCHEMES, llama, quantized

LIBRARIES = ["nf4", "nf4 double", "int8 bitsandbytes", "int8 torchao", "int4 torchao"]

# Their scales are rounded again with the scales of other blocks.
DOUBLE_SCALES = ("nf4 double", "nf4 torchao")


def adapted(scheme: str, base: nn.Module | None = None, **fields: Any) -> nn.Module:
    fields = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "r": 4} | fields
    base = quantized(llama(1), scheme).train() if base is None else base
    return lora_fx.rewrite(base, lora_fx.LoraConfig(**fields)).train()


def oracle(model: nn.Module, name: str) -> torch.Tensor:
    """``g ∘ (W + s·BA)`` in fp64, of the adapter ``default``; W alone where it is not."""
    layer: Any = model.get_submodule(name)
    weight: torch.Tensor = dense(layer.weight).double()
    if not hasattr(layer, "lora_A"):
        return weight
    a, b = (f.default.detach().double() for f in (layer.lora_A, layer.lora_B))
    turned: torch.Tensor = weight + 2.0 * (b @ a)
    if not hasattr(layer, "lora_magnitude_vector"):
        return turned
    m = layer.lora_magnitude_vector.default.detach().double()
    return turned * (m / turned.norm(dim=1))[:, None]


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_weights_are_rounded_once(
    scheme: str, use_dora: bool, dtype: torch.dtype | None
) -> None:
    model = adapted(scheme, lora_alpha=8, use_dora=use_dora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1.25)
    expected = {name: oracle(model, name) for name in linears(model)}
    merged, report = lora_fx.merge(model, dtype=dtype, return_report=True)
    assert {p.dtype for p in merged.parameters()} == {dtype or torch.float32}
    assert report.max_ulp <= 0.5 or dtype == torch.float64
    for name, values in expected.items():
        layer: Any = merged.get_submodule(name)
        assert type(layer) is nn.Linear
        assert type(layer.weight) is nn.Parameter
        error = (layer.weight.detach().double() - values).abs()
        # Half a unit in the last place; the norm of DoRA is summed in another order.
        info = torch.finfo(dtype or torch.float32)
        unit = info.eps * values.abs().clamp_min(info.smallest_normal)
        assert bool((error <= unit / 2 + 1e-14 * values.abs().max()).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_dense_model_computes_what_the_adapted_one_does(scheme: str) -> None:
    model = adapted(scheme)
    before = {n: dense(p).detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(IDS).logits
        found = lora_fx.merge(model).train()(IDS).logits
        again = model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(again, expected)
    assert all(torch.equal(dense(p), before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("scheme", ["nf4", "int8 bitsandbytes", "int8 torchao"])
def test_a_dense_layer_is_torchs_own_with_hooks_and_modes(scheme: str) -> None:
    base = quantized(llama(1), scheme)
    calls: list[str] = []
    base.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("up"))
    base.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append("down"))
    base.model.layers[0].mlp.down_proj.eval()
    merged = lora_fx.merge(adapted(scheme, base.train()))
    merged(IDS)
    assert calls == ["up", "down"]
    plain = nn.Linear(3, 3)
    for name in linears(merged):
        layer = merged.get_submodule(name)
        extra = set(vars(layer)) - set(vars(plain)) - {"_is_hf_initialized"}
        assert not extra, extra
        assert not layer._load_state_dict_pre_hooks
        assert "bitsandbytes" not in repr(layer)
    assert set(merged.state_dict()) == set(llama(1).state_dict())
    llama(1).load_state_dict(merged.state_dict())


def test_eight_bits_take_the_dtype_of_the_rest() -> None:
    base = quantized(llama(1), "int8 bitsandbytes").to(torch.bfloat16)
    merged = lora_fx.merge(adapted("", base))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_four_bits_have_the_dtype_of_their_values(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, dtype=torch.bfloat16
    )
    merged, report = lora_fx.merge(adapted("", base), return_report=True)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert report.max_ulp <= 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_requantized_weights_keep_their_format(scheme: str) -> None:
    model = adapted(scheme, lora_alpha=8)
    expected = {name: oracle(model, name) for name in linears(model)}
    merged, report = lora_fx.merge(model, requantize=True, example_inputs=IDS, return_report=True)
    rows = {row.name: row for row in report.sites}
    assert len(rows) == 2
    for name, values in expected.items():
        layer: Any = merged.get_submodule(name)
        old: Any = model.get_submodule(name)
        assert type(layer) is type(quantized(llama(1), scheme).get_submodule(name))
        assert quantization_of(layer.weight) == quantization_of(old.weight)
        error = float((dense(layer.weight).double() - values).norm() / values.norm())
        if name not in rows:
            assert error == 0
            continue
        assert error == pytest.approx(rows[name].requantization_error, rel=1e-3)
        bits = 8 if "int8" in scheme else 4
        assert 0 < error < {8: 0.01, 4: 0.15}[bits]
        assert rows[name].relative_change > 1
    # The same as quantizing the exact merged weights anew, which each library does in its own way.
    anew = llama(1)
    for name in rows:
        anew.get_submodule(name).weight = nn.Parameter(expected[name].float())
    for name in rows:
        fresh = dense(quantized(anew, scheme).get_submodule(name).weight, torch.float32)
        found = dense(merged.get_submodule(name).weight, torch.float32)
        # bitsandbytes rounds to fp16 before it quantizes to 8 bits, and this does not.
        far = (fresh - found).abs() > 1e-6 * fresh.abs().max()
        # A few groups of integers are in the range of their old scales, and keep them.
        keeping = dict.fromkeys(("int8 torchao", "int4 torchao", "int4 compressed-tensors"), 0.01)
        part = {"int8 bitsandbytes": 1.0, **keeping}.get(scheme, 1e-3)
        errors = [float((matrix - expected[name]).norm()) for matrix in (found, fresh)]
        assert errors[0] < 1.001 * errors[1]
        assert float(far.float().mean()) < part
        assert float((fresh - found).norm() / fresh.norm()) < 0.005
    with torch.no_grad():
        adapted_outputs, base_outputs = (
            m.eval()(IDS).logits
            for m in (model, lora_fx.rewrite(quantized(llama(1), scheme), lora_fx.LoraConfig()))
        )
        found = merged.eval()(IDS).logits
    assert report.outputs is not None
    size = adapted_outputs.norm()
    relative = float((found - adapted_outputs).norm() / size)
    assert report.outputs.relative_error == pytest.approx(relative, rel=1e-3)
    change = float((base_outputs - adapted_outputs).norm() / size)
    assert report.outputs.relative_change == pytest.approx(change, rel=1e-3)
    worst = f"{max(row.requantization_error for row in rows.values()):.2e}"
    assert f"2 weight(s) merged, 2 quantized again, largest error {worst}" in str(report)


@pytest.mark.parametrize("scheme", LIBRARIES)
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("kbit", torch.float32),
        ("norms", torch.float32),
        ("cast", torch.bfloat16),
        ("halves", torch.float32),
    ],
)
def test_a_dense_merge_runs_where_the_adapted_model_did(
    scheme: str, how: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    base: Any = quantized(llama(1) if how == "cast" else llama(1).bfloat16(), scheme).train()
    if how == "kbit":
        if scheme == "nf4":  # whose values are bf16, which the layers of the library leave open
            base = lora_fx.quantize(llama(1).bfloat16(), "nf4").train()
        base = lora_fx.prepare_for_kbit_training(base)
    elif how == "norms":
        base.model.norm.float()
        base.lm_head.float()
    elif how == "halves":
        base.model.layers[0].input_layernorm.half()
        base.lm_head.float()
        base.model.norm.float()
    # A layer of torchao without an adapter refuses input of another dtype, as it does in the base.
    layers = {"target_modules": "all-linear"} if how == "halves" else {}
    model: Any = adapted("", base, **layers)
    if how == "cast":
        model.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS).logits.float()
    # A preparation leaves what is beside torchao's tensors in half precision.
    wanted = torch.bfloat16 if how == "kbit" and "torchao" in scheme else dtype
    merged = lora_fx.merge(model)
    assert {p.dtype for p in merged.parameters()} == {wanted}
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits.float(), expected, atol=0.03, rtol=0)
    assert not [r for r in caplog.records if r.name.startswith("lora_fx")]
    assert merged.model.rotary_emb.inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype


def test_a_base_of_quantized_weights_alone_has_the_dtype_of_their_values() -> None:
    base = quantized(nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16(), "int4 torchao")
    merged = lora_fx.merge(adapted("", base, target_modules=["0"]))
    assert merged.get_parameter("0.weight").dtype == torch.bfloat16


def test_there_is_no_format_to_quantize_a_dense_base_in_again() -> None:
    with pytest.raises(lora_fx.MergeError, match=r"base is not quantized.*lora_fx\.quantize"):
        lora_fx.merge(adapted("", llama(1)), requantize=True)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in DOUBLE_SCALES])
def test_unchanged_weights_are_packed_again_on_the_same_grid(scheme: str) -> None:
    base = quantized(llama(1), scheme)
    model = lora_fx.rewrite(base, LoraConfig(r=2))
    for _ in range(2):
        merged = lora_fx.merge(model, requantize=True)
        for name in linears(base):
            weights = (model.get_submodule(name).weight for model in (merged, base))
            assert_same_bits(*(dense(weight, torch.float32) for weight in weights))
        model = lora_fx.rewrite(merged, LoraConfig(r=2))


@pytest.mark.parametrize("scheme", ["int4 torchao", "int8 torchao"])
def test_blocks_outside_of_the_old_range_get_a_new_scale(scheme: str) -> None:
    weight = quantized(llama(1), scheme).model.layers[0].mlp.up_proj.weight
    values = dense(weight).double()
    values[0] *= 3
    again = requantized(values, weight)
    assert_same_bits(dense(again)[1:], dense(weight)[1:])
    assert not torch.equal(again.scale[0], weight.scale[0])
    assert (
        float((dense(again)[0] - values[0]).abs().max()) <= float(again.scale[0].max()) / 2 + 1e-6
    )


def test_requantized_double_scales_load_and_run(tmp_path: Path) -> None:
    merged = lora_fx.merge(adapted("nf4 double"), requantize=True)
    torch.save(merged.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    names = [n for n in state if "q_proj.weight." in n]
    assert any("nested_absmax" in n for n in names)
    copied = copy.deepcopy(merged)
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, merged(IDS).logits)


def test_a_plain_weight_beside_quantized_ones_is_rounded_once() -> None:
    model = adapted("nf4", target_modules=["q_proj", "lm_head"])
    merged, report = lora_fx.merge(model, requantize=True, return_report=True)
    head = next(row for row in report.sites if row.name == "lm_head")
    assert not head.requantized
    assert head.max_ulp <= 0.5
    assert "1 quantized again" in str(report)
    assert type(merged.lm_head.weight) is nn.Parameter


def test_one_of_several_adapters_is_merged() -> None:
    model = adapted("nf4", lora_alpha=8)
    lora_fx.add_adapter(
        model,
        lora_fx.LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"], init_lora_weights=False),
        "second",
    )
    name = "model.layers.0.mlp.up_proj"
    layer: Any = model.get_submodule(name)
    a, b = (f.second.detach().double() for f in (layer.lora_A, layer.lora_B))
    expected = dense(layer.weight).double() + b @ a
    merged = lora_fx.merge(model, adapter_names="second")
    assert torch.equal(merged.get_submodule(name).weight, expected.float())
    _, report = lora_fx.merge(
        model, adapter_names="second", requantize=True, example_inputs=IDS, return_report=True
    )
    assert [row.adapters for row in report.sites] == [("second",)]
    assert lora_fx.active_adapters(model) == ("default",)
    lora_fx.set_adapter(model, "second")
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        found = lora_fx.merge(model, requantize=True).eval()(IDS).logits
    assert report.outputs.relative_error == pytest.approx(
        float((wanted - found).norm() / wanted.norm()), rel=1e-3
    )


def test_into_a_dense_model_adds_to_its_weights() -> None:
    model, into = adapted("nf4", lora_alpha=8), llama(1)
    before = copy.deepcopy(into)
    merged = lora_fx.merge(model, into=into)
    assert merged is into
    for name in linears(into):
        layer: Any = model.get_submodule(name)
        expected = before.get_submodule(name).weight.detach().double()
        if hasattr(layer, "lora_A"):
            a, b = (f.default.detach().double() for f in (layer.lora_A, layer.lora_B))
            expected = expected + 2.0 * (b @ a)
        torch.testing.assert_close(
            into.get_submodule(name).weight.detach(), expected.float(), atol=1e-7, rtol=0
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": torch.float16, "requantize": True}, "leave out dtype"),
        ({"into": llama(1), "requantize": True}, "leave out into"),
        ({"into": llama(1), "dtype": torch.float16}, "into keeps its dtype"),
    ],
)
def test_arguments_that_exclude_each_other(how: dict[str, Any], message: str) -> None:
    with pytest.raises(lora_fx.MergeError, match=message):
        lora_fx.merge(adapted("nf4"), **how)


@pytest.mark.parametrize("scheme", ["nf4", "int8 torchao"])
def test_a_quantized_model_is_nothing_to_merge_into(scheme: str) -> None:
    into = quantized(llama(1), scheme)
    with pytest.raises(lora_fx.MergeError, match=r"quantized weights.*requantize=True"):
        lora_fx.merge(adapted(scheme), into=into)


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("scheme", LIBRARIES)
def test_what_is_not_finite_is_refused(scheme: str, requantize: bool) -> None:
    model = adapted(scheme)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.default[0, 0] = torch.inf
    with pytest.raises(lora_fx.MergeError, match=r"q_proj.*not finite"):
        lora_fx.merge(model, requantize=requantize)


def test_a_format_that_cannot_hold_a_weight_names_the_dense_merge() -> None:
    model = adapted("int4 torchao", quantized(llama(1).to(torch.float16), "int4 torchao"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.default.fill_(3e3)
        model.model.layers[0].self_attn.q_proj.lora_A.default.fill_(3e3)
    with pytest.raises(lora_fx.MergeError, match=r"q_proj.*cannot be quantized.*requantize=True"):
        lora_fx.merge(model, requantize=True)
    with pytest.raises(lora_fx.MergeError, match=r"q_proj.*overflows torch.float16.*wider dtype"):
        lora_fx.merge(model)
    assert torch.isfinite(next(lora_fx.merge(model, dtype=torch.float32).parameters())).all()


def test_a_library_without_a_kernel_here_names_the_dense_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel for this device")

    model = adapted("nf4")
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", refuse)
    with pytest.raises(lora_fx.MergeError, match=r"no kernel for this device.*dense then"):
        lora_fx.merge(model, requantize=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_casts_an_unquantized_model_once(dtype: torch.dtype) -> None:
    base = llama(1)
    base.lm_head.weight = base.model.embed_tokens.weight
    model = adapted("", base, lora_alpha=8)
    name = "model.layers.0.self_attn.q_proj"
    layer: Any = model.get_submodule(name)
    merged, report = lora_fx.merge(model, dtype=dtype, return_report=True)
    a, b = (f.default.detach().double() for f in (layer.lora_A, layer.lora_B))
    exact = layer.get_parameter("weight").detach().double() + 2.0 * (b @ a)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert report.max_ulp <= 0.5 or dtype == torch.float64
    if dtype == torch.float64:
        assert torch.equal(merged.get_submodule(name).weight, exact)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert merged.lm_head.weight.untyped_storage().data_ptr() != base.lm_head.weight.data_ptr()


def test_a_cast_leaves_layers_that_have_not_run() -> None:
    base = nn.ModuleDict({"fc": nn.Linear(8, 8), "later": nn.LazyLinear(8)})
    base.forward = base["fc"].forward
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, target_modules=["fc"]))
    merged: Any = lora_fx.merge(model, dtype=torch.bfloat16)
    assert merged["fc"].weight.dtype == torch.bfloat16
    assert isinstance(merged["later"].weight, nn.UninitializedParameter)


def test_a_cast_that_overflows_is_refused() -> None:
    base = llama(1)
    with torch.no_grad():
        base.model.norm.weight[0] = 1e6
    with pytest.raises(lora_fx.MergeError, match=r"model.norm.weight overflows torch.float16"):
        lora_fx.merge(adapted("", base), dtype=torch.float16)


@pytest.mark.parametrize("four", [True, False])
def test_transformers_writes_and_loads_a_dense_merge_as_a_plain_model(
    tmp_path: Path, four: bool
) -> None:
    llama(1).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how)
    model = adapted("", base)
    merged = lora_fx.merge(model).eval()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(again, "hf_quantizer")
    assert not quantization_of(again.model.layers[0].self_attn.q_proj.weight)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, merged(IDS).logits)
    assert base.is_quantized
    assert not model.is_quantized  # has adapters, says the Trainer
    assert hasattr(base.config, "quantization_config")
    requantized = lora_fx.merge(model, requantize=True)
    assert requantized.is_quantized
    requantized.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (loaded, requantized)]
    assert torch.equal(weights[0].data, weights[1].data)


def in_storage(storage: torch.dtype) -> nn.Module:
    """4 bits in bytes of another dtype, as FSDP wants them."""
    import bitsandbytes as bnb

    base = llama(1)
    for name in linears(base):
        old: Any = base.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, quant_type="nf4", quant_storage=storage
        )
        new.load_state_dict(old.state_dict())
        owner, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(owner), leaf, new.to("cpu"))
    return base.train()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_of_another_dtype_are_no_numbers(storage: torch.dtype) -> None:
    model = adapted("", in_storage(storage))
    plain = adapted("", in_storage(torch.uint8))
    merged = lora_fx.merge(model, dtype=torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    again = lora_fx.merge(model, requantize=True)
    other = lora_fx.merge(plain, requantize=True)
    for name in linears(again):
        weights: list[Any] = [m.get_submodule(name).weight for m in (again, other)]
        assert weights[0].dtype == storage
        assert torch.equal(*(dense(weight) for weight in weights))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("requantize", [False, True])
def test_one_layer_at_a_time_is_dense(requantize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.passes.merge import dense as _dense

    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal most
        values = dense(weight, *args)
        made.append(weakref.ref(values))
        most = max(most, sum(one() is not None for one in made))
        return values

    model = adapted("nf4", quantized(llama(4), "nf4"), target_modules=None)
    monkeypatch.setattr(_dense, "dense", counted)
    # In another dtype, so that the result is none of the values that are made.
    dtype = None if requantize else torch.bfloat16
    lora_fx.merge(model, requantize=requantize, dtype=dtype)
    assert len(made) == 28
    # That of the weight before is gone when the next one is there.
    assert most == 1


@pytest.mark.cuda
@pytest.mark.parametrize("scheme", ["nf4", "nf4 double", "int8 bitsandbytes", "int8 torchao"])
def test_it_merges_where_the_weights_are(scheme: str) -> None:
    base = quantized(llama(1), scheme).to("cuda", torch.bfloat16)
    model = adapted("", base)
    merged = lora_fx.merge(model, dtype=torch.bfloat16).eval()
    again, report = lora_fx.merge(
        model, requantize=True, example_inputs=IDS.cuda(), return_report=True
    )
    assert {p.device.type for m in (merged, again) for p in m.parameters()} == {"cuda"}
    assert 0 < report.requantization_error < 0.15
    with torch.no_grad():
        expected = model.eval()(IDS.cuda()).logits
        torch.testing.assert_close(merged(IDS.cuda()).logits, expected, atol=0.05, rtol=0)


def test_a_base_in_half_precision_is_merged_as_it_computes_after_its_preparation() -> None:
    # Everything else is fp32 then: the kernel does not round the values to bf16 before it multiplies.
    prepared = lora_fx.prepare_for_kbit_training(lora_fx.quantize(llama().bfloat16(), "nf4"))
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False)
    model = lora_fx.rewrite(prepared, config).eval()
    merged = lora_fx.merge(model)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=5e-6, rtol=0)


@pytest.mark.parametrize("scheme", LIBRARIES)
def test_a_model_of_its_own_in_the_same_format(scheme: str) -> None:
    """With what its library keeps beside the weights, too."""
    base = quantized(llama(1), scheme).train()
    model = adapted(scheme, base)
    with torch.no_grad():
        expected = base(IDS).logits
    merged = lora_fx.merge(model, requantize=True, own=True)
    with torch.no_grad():
        shared = lora_fx.merge(model, requantize=True).train()(IDS).logits
        assert torch.equal(merged.train()(IDS).logits, shared)
        for parameter in merged.parameters():
            for part in (parameter, *vars(parameter).values()):
                absmax = getattr(part, "absmax", None)
                for tensor in (part, absmax):
                    if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point():
                        tensor.add_(1.0)
        assert not torch.equal(merged(IDS).logits, shared)
        assert torch.equal(base(IDS).logits, expected)
    addresses = {p.data_ptr() for p in base.parameters()}
    assert not addresses & {p.data_ptr() for p in merged.parameters() if p.data_ptr()}
