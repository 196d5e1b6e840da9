"""Weights of captured models in few bits: which, with which values, and what the result still is."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_fx
from lora_fx import LoraConfig, QuantizationError
from lora_fx.formats import dense, quantization_of
from tests.formats import mixture
from tests.numerics import relative_error
from tests.quantized import IDS, llama

FORMATS = ("nf4", "fp4", "int8", "int4")
CONFIG = LoraConfig(r=4)


class Functional(nn.Module):
    """One linear operation for each way to write it, and a head."""

    def __init__(self, width: int = 32, out: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.w = nn.Parameter(torch.randn(out, width) / 6)
        self.b = nn.Parameter(torch.randn(out)) if bias else None
        self.turned = nn.Parameter(torch.randn(out, width) / 6)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.first(x), self.w, self.b)
        return self.head(torch.relu(x) @ self.turned)


class Product(nn.Module):
    """``x @ W``, W [in, out]."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, out))
        self.b = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        return y if self.b is None else y + self.b


class Affine(nn.Module):
    """``F.linear`` over parameters of its own."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(out, width))
        self.b = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class Body(nn.Module):
    """An operation that is not the head."""

    def __init__(self, inner: nn.Module, out: int) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


class OwnLinear(nn.Linear):
    """A class of the user's."""


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1, vocab_size=97)
    return T5ForConditionalGeneration(config).eval()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def ids_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def widened(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """The model with the values that the quantized one has: what it has to compute."""
    result = copy.deepcopy(model)
    turned = {row.site.weight for row in lora_fx.plan(quantized, CONFIG) if row.site.turned}
    for name, weight in quantized.named_parameters():
        if quantization_of(weight) is not None:
            values = dense(weight)
            with torch.no_grad():
                result.get_parameter(name).copy_(values.T if name in turned else values)
    return result


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], int]] = {
    "llama": (lambda: llama(1), lambda m: m(IDS).logits, 7),
    "gpt2": (gpt2, lambda m: m(IDS).logits, 4),
    "functional": (
        lambda: seeded(Functional),
        lambda m: m(torch.linspace(-1, 1, 160).view(5, 32)),
        3,
    ),
    "encoder": (
        lambda: seeded(Encoder),
        lambda m: m(torch.linspace(-1, 1, 320).view(2, 5, 32)),
        6,
    ),
    "own class": (
        lambda: seeded(lambda: Body(OwnLinear(32, 32), 32)),
        lambda m: m(torch.linspace(-1, 1, 160).view(5, 32)),
        1,
    ),
}


@pytest.mark.parametrize("format_name", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_the_result_computes_with_the_values_that_are_stored(case: str, format_name: str) -> None:
    make, call, count = CASES[case]
    model = make().eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = lora_fx.quantize(model, format_name)
    stored = [p for p in result.parameters() if quantization_of(p) is not None]
    assert len(stored) == count
    assert isinstance(result, type(model))
    assert not any(p.requires_grad for p in result.parameters())
    with torch.no_grad():
        torch.testing.assert_close(call(result), call(widened(model, result)), atol=2e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert quantization_of(parameter) is None


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_result_is_planned_rewritten_and_trained(case: str, format_name: str) -> None:
    make, call, count = CASES[case]
    base = lora_fx.quantize(make().eval(), format_name)
    plan = lora_fx.plan(base, CONFIG)
    assert sum(row.site.quantized is not None for row in plan.sites) == count
    model = lora_fx.rewrite(base, CONFIG)
    with torch.no_grad():
        torch.testing.assert_close(call(model), call(base), atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(model), lr=1.0)
    call(model).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert (call(model) - call(base)).abs().max() > 1e-6
    again = lora_fx.rewrite(base, CONFIG)
    with torch.no_grad():
        torch.testing.assert_close(call(again), call(base), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["functional", "encoder"])
def test_what_is_not_adapted_reads_its_quantized_weights_too(case: str) -> None:
    make, call, _ = CASES[case]
    base = lora_fx.quantize(make(), "nf4")
    target = {"functional": "first", "encoder": "linear2"}[case]
    model = lora_fx.rewrite(base, LoraConfig(r=4, target_modules=[target]))
    with torch.no_grad():
        torch.testing.assert_close(call(model), call(base), atol=1e-6, rtol=0)
        with lora_fx.disable_adapter(model):
            torch.testing.assert_close(call(model), call(base), atol=1e-6, rtol=0)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("format_name", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(format_name: str, double: bool) -> None:
    import bitsandbytes as bnb

    model = llama()
    result = lora_fx.quantize(model, format_name, double=double, block_size=32)
    layer = result.model.layers[1].mlp.down_proj
    assert type(layer) is bnb.nn.Linear4bit
    assert layer.quant_state is layer.weight.quant_state
    packed, state = bnb.functional.quantize_4bit(
        model.model.layers[1].mlp.down_proj.weight.detach(),
        blocksize=32,
        compress_statistics=double,
        quant_type=format_name,
    )
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    found = quantization_of(layer.weight)
    assert found is not None
    assert (found.scheme, found.block_size, found.double) == (format_name, 32, double)


def test_blocks_are_smaller_where_64_does_not_divide_the_rows() -> None:
    # The kernel of bitsandbytes for CPUs reads the scales of other blocks there.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 40), nn.Linear(40, 8))
    result = lora_fx.quantize(model, "nf4", exclude=["2"])
    assert [quantization_of(result[i].weight).block_size for i in (0, 1)] == [32, 64]
    for i in (0, 1):
        exact = model[i].weight
        assert float((dense(result[i].weight) - exact).norm() / exact.norm()) < 0.1
    model.append(nn.Linear(8, 8))
    with pytest.raises(QuantizationError, match="do not divide its rows of 40 values: 'int8'"):
        lora_fx.quantize(model, "nf4")


@pytest.mark.parametrize(("format_name", "block"), [("int8", None), ("int4", 32), ("int4", 64)])
def test_values_are_those_of_torchao(format_name: str, block: int | None) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    config: Any = Int8WeightOnlyConfig()
    if block is not None:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(block))
    model = llama()
    expected = copy.deepcopy(model)
    quantize_(
        expected, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm" not in name
    )
    result = lora_fx.quantize(model, format_name, block_size=block)
    for name, parameter in expected.named_parameters():
        own = result.get_parameter(name)
        assert type(own.data) is type(parameter.data), name
        assert torch.equal(dense(own), dense(parameter)), name


def test_weights_that_stay_are_shared() -> None:
    model = llama()
    result = lora_fx.quantize(model, "nf4")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert result.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()


def test_modules_keep_hooks_names_and_biases() -> None:
    model = seeded(Functional)
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("first"))
    model.first.mark = "kept"
    result = lora_fx.quantize(model, "nf4")
    result(torch.randn(2, 32))
    assert seen == ["first"]
    assert result.first.mark == "kept"
    assert result.first.bias.data_ptr() == model.first.bias.data_ptr()
    assert {n for n, _ in result.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_a_functional_operation_is_one_node() -> None:
    result = lora_fx.quantize(gpt2(), "nf4", compute_dtype=torch.float32)
    graph = lora_fx.graphs(result)["transformer.h.0.mlp.c_fc"]
    nodes = [n for n in graph.nodes if getattr(n.target, "__name__", "") == "quantized_linear"]
    assert len(nodes) == 1
    assert nodes[0].kwargs == {"compute_dtype": torch.float32, "layout": "in_out"}
    weight = result.transformer.h[0].mlp.c_fc.weight
    assert quantization_of(weight).shape == (128, 32)
    sites = {row.name: row.site for row in lora_fx.plan(result, CONFIG).sites}
    assert sites["transformer.h.0.mlp.c_fc"].weight_shape == (32, 128)


def test_pictures_show_quantized_operations(tmp_path: Any) -> None:
    path = lora_fx.visualize(lora_fx.quantize(gpt2(), "nf4"), tmp_path / "model.json")
    boxes = json.loads(path.read_text())["nodes"]
    assert sum(box["name"] == "quantized_linear" for box in boxes) == 4
    assert "96×32 nf4" in str(boxes)
    path = lora_fx.visualize(lora_fx.quantize(llama(1), "nf4"), tmp_path / "llama.json")
    nodes = json.loads(path.read_text())["nodes"]
    assert ("Linear4bit 128×64", ["nf4"]) in [(box["caption"], box["marks"]) for box in nodes]


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "encoder"])
def test_copies_pickles_and_state_dicts(case: str, format_name: str) -> None:
    make, call, _ = CASES[case]
    model = make().eval()
    result = lora_fx.quantize(model, format_name)
    stream = io.BytesIO()
    torch.save(result, stream)
    stream.seek(0)
    other = make().eval()
    with torch.no_grad():
        expected = call(result)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        loaded = lora_fx.quantize(other, format_name)
        assert not torch.equal(call(loaded), expected)
        loaded.load_state_dict(result.state_dict())
        twins = [copy.deepcopy(result), torch.load(stream, weights_only=False), loaded]
        for twin in twins:
            assert torch.equal(call(twin), expected)
            assert torch.equal(call(lora_fx.rewrite(twin, CONFIG)), expected)


def test_a_pickle_needs_nothing_of_lora_fx_for_bitsandbytes_parameters() -> None:
    weight = lora_fx.quantize(llama(1), "nf4").model.layers[0].mlp.up_proj.weight
    data = pickle.dumps(weight)
    assert b"lora_fx" not in data
    found = pickle.loads(data)
    assert type(found) is type(weight)
    assert torch.equal(dense(found), dense(weight))


def test_a_state_dict_in_another_format_is_refused() -> None:
    state = lora_fx.quantize(llama(1), "nf4").state_dict()
    with pytest.raises(RuntimeError, match=r"is stored as .*fp4"):
        lora_fx.quantize(llama(1), "fp4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="without its scales"):
        lora_fx.quantize(llama(1), "nf4").load_state_dict(llama(1).state_dict())


@pytest.mark.parametrize("make", [lambda: llama(1), gpt2])
@pytest.mark.parametrize(("format_name", "other"), [("int8", "int4"), ("int4", "int8")])
def test_torchaos_tensors_refuse_what_they_cannot_copy(
    make: Callable[[], nn.Module], format_name: str, other: str, tmp_path: Any
) -> None:
    model, twin = (lora_fx.quantize(make(), format_name) for _ in range(2))
    expected = ids_of(model)
    for state, words in (
        (make().state_dict(), f"is stored as {format_name} .* here and has its values there"),
        (lora_fx.quantize(make(), other).state_dict(), rf"as {other} \(torchao.*lora_fx.quantize"),
    ):
        with pytest.raises(RuntimeError, match=words) as found:
            model.load_state_dict(state)
        assert "Missing" not in str(found.value)
        assert "copying" not in str(found.value)
        assert torch.equal(ids_of(model), expected)
    torch.save(twin.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    model.load_state_dict(state)
    assert torch.equal(ids_of(model), expected)
    merged = lora_fx.merge(lora_fx.rewrite(model, CONFIG))
    merged.load_state_dict(make().state_dict())


@pytest.mark.parametrize("format_name", ["nf4", "int8", "int4"])
def test_peft_takes_it_and_both_read_one_adapter(format_name: str, tmp_path: Any) -> None:
    base = lora_fx.quantize(llama().eval(), format_name)
    config = PeftConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(base), config)
    kind = type(theirs.base_model.model.model.layers[0].mlp.up_proj)
    assert kind.__module__ == f"peft.tuners.lora.{'bnb' if format_name == 'nf4' else 'torchao'}"
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(base, tmp_path)
    torch.testing.assert_close(ids_of(ours), ids_of(theirs), atol=1e-6, rtol=0)
    assert (ids_of(ours) - ids_of(base)).abs().max() > 1e-3


@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_what_it_writes_of_it(double: bool, tmp_path: Any) -> None:
    model = llama(1).eval()
    base = lora_fx.quantize(model, "nf4", double=double, exclude=["k_proj"])
    base.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert not hasattr(model.config, "quantization_config")
    for name, parameter in base.named_parameters():
        assert torch.equal(dense(parameter), dense(loaded.get_parameter(name))), name
    expected, found = ids_of(base), ids_of(lora_fx.rewrite(loaded, CONFIG).train())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_what_transformers_cannot_load_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.quantize(llama(1), "nf4")
        assert "from_pretrained" not in caplog.text
        base = lora_fx.quantize(gpt2(), "nf4")
    assert "from_pretrained cannot load what save_pretrained writes of this GPT2LM" in caplog.text
    assert not hasattr(base.config, "quantization_config")
    base.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("format_name", FORMATS)
def test_on_a_gpu(format_name: str) -> None:
    model = llama(1).eval()
    base = lora_fx.quantize(model, format_name, device="cuda")
    assert {p.device.type for p in base.parameters()} == {"cuda"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    adapted, ids = lora_fx.rewrite(base, CONFIG), IDS.cuda()
    on_cpu = lora_fx.quantize(model, format_name)
    torch.testing.assert_close(adapted(ids).logits.cpu(), ids_of(on_cpu), atol=5e-3, rtol=0)
    adapted(ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# --- what is left as it is ----------------------------------------------------------------------------


def test_a_weight_whose_dtype_code_asks_for_stays() -> None:
    model = t5()
    for format_name, kept in (("nf4", True), ("int8", False)):
        plan = lora_fx.plan_quantization(model, format_name)
        left = {name: reason for name, reason in plan.left if name.endswith("wo")}
        assert bool(left) is kept
        assert all("T5DenseActDense.forward asks for its dtype" in r for r in left.values())
        result = lora_fx.quantize(model, format_name)
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        with torch.no_grad():
            expected = widened(model, result)(**inputs).logits
            torch.testing.assert_close(result(**inputs).logits, expected, atol=2e-5, rtol=1e-5)


class Left(nn.Module):
    """What no format can hold, and one operation that all can."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 32)
        self.tied = nn.Linear(32, 9, bias=False)
        self.tied.weight = self.table.weight
        self.conv = nn.Conv1d(32, 32, 1)
        self.qkv = nn.Parameter(torch.randn(96, 32))
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        self.side = nn.Parameter(torch.randn(32, 32))
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(41, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = F.linear(x, self.qkv[:32]) + F.linear(x, self.qkv[32:64]) * F.linear(x, self.qkv[64:])
        x = torch.bmm(x, self.experts[: x.shape[0]]) if False else x @ self.experts[1]
        x = (self.side @ x.transpose(1, 2)).transpose(1, 2)
        x = self.inner(x)
        return self.head(torch.cat([x, self.tied(x)], dim=-1))


def test_every_operation_that_stays_has_its_reason() -> None:
    model = seeded(Left)
    plan = lora_fx.plan_quantization(model, "nf4")
    assert [one.name for one in plan] == ["experts", "inner"]
    left = dict(plan.left)
    words = {
        "table": "a lookup",
        "tied": "tied to table.weight",
        "conv": "a convolution",
        "qkv.q": "rows 0 to 32",
        "side": "left operand",
        "head": "output head",
    }
    for name, word in words.items():
        assert word in left[name], (name, left)
    shown = str(plan)
    assert "inner" in shown
    assert all(reason in shown for reason in left.values())
    sizes = {row["name"]: row["shape"] for row in plan.to_dict()["weights"]}
    assert sizes == {"experts": [4, 32, 32], "inner": [32, 32]}
    result = lora_fx.quantize(model, "nf4")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(result(ids), widened(model, result)(ids), atol=1e-2, rtol=1e-5)


class Chooses(nn.Module):
    """Chooses a layer by a setting that no guard compares, beside a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.side = nn.Parameter(torch.randn(64, 64))
        self.head = nn.Linear(64, 2)
        self.setting = types.SimpleNamespace(first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.inner if self.setting.first else self.other)(x)
        return self.head(x @ self.side)


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_a_forward_that_no_graph_can_replace_keeps_its_products(format_name: str) -> None:
    model = seeded(Chooses)
    left = dict(lora_fx.plan_quantization(model, format_name).left)
    assert re.match(r"a forward computes this product itself.*reads setting", left["side"])
    result = lora_fx.quantize(model, format_name)
    result.setting.first = False
    with torch.no_grad():
        reference = widened(model, result)
        reference.setting.first = False
        x = torch.randn(2, 64)
        torch.testing.assert_close(result(x), reference(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "exclude", [["up_proj", "layers.0.mlp.down_proj"], r".*\.(up_proj|0\.mlp\.down_proj)"]
)
def test_exclude_goes_by_the_rules_of_exclude_modules(exclude: Any) -> None:
    plan = lora_fx.plan_quantization(llama(), "nf4", exclude=exclude)
    assert len(plan) == 11
    assert not [one.name for one in plan if "up_proj" in one.name]


def test_an_entry_of_exclude_that_names_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_fx"):
        lora_fx.plan_quantization(llama(), "nf4", exclude=["up_prj", "nope"])
    assert "'up_prj'; nearest: 'up_proj'" in caplog.text
    assert "'nope'; operations end in: " in caplog.text
    assert "'q_proj', " in caplog.text.partition("operations end in")[2]


# --- what is refused ----------------------------------------------------------------------------------


def test_quantizing_twice() -> None:
    once = lora_fx.quantize(llama(1), "nf4")
    with pytest.raises(QuantizationError, match=r"quantized already, nf4 .*lora_fx.rewrite"):
        lora_fx.quantize(once, "int8")
    with pytest.raises(QuantizationError, match="has adapters"):
        lora_fx.quantize(lora_fx.rewrite(llama(1), CONFIG), "nf4")


@pytest.mark.parametrize(
    ("format_name", "options", "words"),
    [
        ("nf5", {}, "use nf4, fp4, int8, int4"),
        (["nf4"], {}, "use nf4, fp4, int8, int4"),
        ("nf4", {"block_size": 48}, "bitsandbytes takes 32, 64"),
        ("int4", {"block_size": 48}, "power of two"),
        ("int4", {"block_size": 256}, "block_size=64 does, or 'int8'"),
        ("int8", {"block_size": 64}, "'nf4', 'fp4' and 'int4' take it"),
        ("nf4", {"block_size": 256}, "block_size=64 does, or 'int8'"),
        ("int8", {"double": True}, "'nf4' does"),
        ("int4", {"compute_dtype": torch.float16}, "'nf4' does"),
        ("nf4", {"compute_dtype": torch.float64}, "computes in torch.float32, torch.float16"),
        ("nf4", {"compute_dtype": "bfloat16"}, "compute_dtype='bfloat16': .*torch.bfloat16"),
        ("nf4", {"device": "meta"}, "device='cpu' does"),
        ("nf4", {"device": "no"}, "device='cpu' can"),
        ("nf4", {"device": 3.5}, "the name of one, as 'cpu'"),
        ("nf4", {"block_size": 64.0}, "block_size=64.0: it is a whole number"),
        ("int4", {"block_size": "64"}, "block_size='64': it is a whole number"),
        ("int4", {"block_size": True}, "block_size=True: it is a whole number"),
        ("nf4", {"block_size": 0}, "block_size=0: bitsandbytes takes 32, 64"),
        ("int4", {"block_size": 0}, "power of two"),
        ("nf4", {"double": "x"}, "double='x': it is True or False"),
        ("nf4", {"exclude": 3}, "^exclude: found 3; give a list"),
        ("nf4", {"exclude": [3]}, "^exclude: found 3; every entry"),
        ("nf4", {"exclude": "("}, r"^exclude: found '\('; it is not a regular expression"),
        ("nf4", {"exclude": r".*"}, "nothing to quantize"),
    ],
)
def test_what_means_nothing_names_what_does(
    format_name: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(QuantizationError, match=words):
        lora_fx.quantize(llama(1), format_name, **options)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is MPS")
def test_a_backend_that_is_not_there_is_said_in_a_line() -> None:
    with pytest.raises(
        QuantizationError, match=r"device='mps' cannot be used .*device='cpu' can"
    ) as found:
        lora_fx.quantize(llama(1), "int8", device="mps")
    assert len(str(found.value)) < 250


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(
        QuantizationError, match=r"device='cuda' cannot be used .* device='cpu' can"
    ):
        lora_fx.quantize(llama(1), "nf4", device="cuda")


def test_a_format_that_does_not_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(QuantizationError, match=r"'fp4' does not run on cpu.*Use 'int8' or 'int4'"):
        lora_fx.quantize(llama(1), "fp4")


@pytest.mark.parametrize(
    ("format_name", "library", "instead"),
    [("nf4", "bitsandbytes", "'int8'"), ("int8", "torchao", "'nf4'")],
)
def test_a_missing_library(
    format_name: str, library: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(QuantizationError, match=rf"lora-fx\[quant\].*{instead}"):
        lora_fx.quantize(llama(1), format_name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    model = llama(1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(QuantizationError, match=r"layers\.0\.mlp\.up_proj\.weight has values"):
        lora_fx.quantize(model, "nf4")
    lora_fx.quantize(model, "nf4", exclude=["up_proj"])


@pytest.mark.parametrize("format_name", FORMATS)
def test_double_precision(format_name: str) -> None:
    with pytest.raises(QuantizationError, match=r"torch.float64.*model.float\(\) first"):
        lora_fx.quantize(llama(1).double(), format_name)


def test_a_call_that_the_graph_was_not_made_for_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return F.linear(x, self.w) * scale

    result = lora_fx.quantize(Body(Branching(), 32), "nf4")
    result(torch.randn(2, 32))
    with pytest.raises(lora_fx.CaptureError, match="does not know its quantized weight"):
        result.inner(torch.randn(2, 32), 2.0)


# --- properties ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from([nn.Linear, Affine, Product]),
    blocks=st.integers(1, 4),
    out=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    format_name=st.sampled_from(FORMATS),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_any_shape_layout_and_bias(
    kind: Any,
    blocks: int,
    out: int,
    bias: bool,
    dtype: torch.dtype,
    format_name: str,
    shape: list[int],
) -> None:
    width = 32 * blocks
    torch.manual_seed(blocks * 100 + out)
    model = Body(kind(width, out, bias), out).to(dtype).eval()
    result = lora_fx.quantize(model, format_name)
    x = torch.randn(*shape, width, dtype=dtype)
    with torch.no_grad():
        found, expected = result(x), widened(model, result)(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    adapted = lora_fx.rewrite(result, LoraConfig(r=2, init_lora_weights=False))
    (stored,) = [p for p in result.parameters() if quantization_of(p) is not None]
    before = dense(stored)
    adapted(x).float().sum().backward()
    assert torch.equal(dense(stored), before)
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None for g in grads)


class FromTheLeft(nn.Module):
    """Computes with the weight of a layer, in a forward without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        return (self.read.weight @ x.mT).mT if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_that_code_without_a_graph_computes_with_stays(kind: str) -> None:
    layers = FromTheLeft(), nn.Linear(64, 64), nn.Linear(64, 4)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 64)
    assert "0.read: FromTheLeft.forward" in str(lora_fx.plan_quantization(model, kind))
    result = lora_fx.quantize(model, kind)
    assert quantization_of(result[0].read.weight) is None
    assert (quantization_of(result[0].called.weight) is None) == (kind in ("nf4", "fp4"))
    assert relative_error(result(x), model(x)) < 0.2


@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_dict_can_be_assigned(kind: str) -> None:
    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        base = mixture()
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.1)
        config = LoraConfig(r=2, init_lora_weights=False, seed=seed)
        return lora_fx.rewrite(lora_fx.quantize(base, kind), config)

    source, model = drawn(1), drawn(2)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(IDS).logits, source(IDS).logits)
    assert state.keys() == model.state_dict().keys()
    base = lora_fx.merge(model, requantize=True)
    assert torch.equal(base(IDS).logits, lora_fx.merge(source, requantize=True)(IDS).logits)
