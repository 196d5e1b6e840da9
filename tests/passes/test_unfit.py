"""Weights that cannot be adapted: a row of the dry run, an error where one is named, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import LoraConfig
from lora_fx.errors import NoMatchError
from tests.numerics import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")


class Around(nn.Module):
    """A layer that is fine after one that may not be."""

    def __init__(self, bad: nn.Module) -> None:
        super().__init__()
        self.bad, self.ok, self.head = bad, nn.Linear(4, 4), nn.Linear(4, 2)
        self.pair = type(bad).__name__ in ("RNN", "LSTM", "GRU", "LSTMCell")

    def forward(self, x):
        y = self.bad(x)
        y = y[0] if self.pair else y
        return self.head(torch.tanh(self.ok(y)))


class Applies(nn.Module):
    """Does something with a weight of its own."""

    def __init__(self, weight: torch.Tensor, how: Callable[..., Any], *, buffer: bool = False):
        super().__init__()
        self.how = how
        if buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())

    def forward(self, x):
        return self.how(x, self.weight)


class Packed(torch.Tensor):
    """A matrix of integers that looks like one of floating-point numbers, as torchao has them."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        plain = pytree.tree_map_only(cls, lambda t: t.inner.float(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


def integers(dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(-9, 9, (4, 4)).to(dtype)


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(4, 4, **options)


def sparse(layout: str) -> nn.Module:
    layer = linear()
    arguments = ((2, 2),) if layout == "bsr" else ()
    dense = layer.weight.data
    layer.weight = nn.Parameter(getattr(dense, f"to_sparse_{layout}")(*arguments))
    return layer


def symmetric() -> nn.Module:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def dynamic() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear})[0]


def cast(x, weight):
    return F.linear(x, weight.to(x.dtype))


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "int8, cast": (lambda: Applies(integers(), cast), "torch.int8, not floating point"),
    "int8 buffer": (lambda: Applies(integers(), cast, buffer=True), "not floating point"),
    "int32": (lambda: Applies(integers(torch.int32), F.linear), "torch.int32, not floating"),
    "int8 table": (lambda: Applies(integers(), F.embedding), "torch.int8"),
    "int conv": (
        lambda: Applies(integers(torch.int32)[..., None], F.conv1d),
        "torch.int32",
    ),
    "int_mm": (lambda: Applies(integers(), torch._int_mm), "torch.int8"),
    "float8": (
        lambda: Applies(torch.randn(4, 4).to(torch.float8_e4m3fn), cast),
        "torch.float8_e4m3fn, a quantized format",
    ),
    "float8, uncast": (
        lambda: Applies(torch.randn(4, 4).to(torch.float8_e5m2), F.linear),
        "torch.float8_e5m2",
    ),
    "packed": (lambda: Applies(Packed(integers()), F.linear), "a Packed, which holds quantized"),
    "dynamic": (dynamic, "it is quantized (torch.ao.nn.quantized.dynamic.modules.linear.Linear)"),
    "static": (lambda: torch.ao.nn.quantized.Linear(4, 4), "it is quantized"),
    "static conv": (lambda: torch.ao.nn.quantized.Conv1d(4, 4, 1), "it is quantized"),
    "dynamic LSTM": (lambda: torch.ao.nn.quantized.dynamic.LSTM(4, 4), "it is quantized"),
    "complex": (lambda: linear(dtype=torch.complex64), "torch.complex64, and an adapter is real"),
    **{
        layout: (lambda layout=layout: sparse(layout), f"sparse (sparse_{layout})")
        for layout in ("coo", "csr", "csc", "bsr")
    },
    "RNN": (lambda: nn.RNN(4, 4), "inside one opaque call"),
    "LSTM": (lambda: nn.LSTM(4, 4, 2), "inside one opaque call"),
    "GRU": (lambda: nn.GRU(4, 2, bidirectional=True), "inside one opaque call"),
    "LSTMCell": (lambda: nn.LSTMCell(4, 4), "inside one opaque call"),
    "lazy": (lambda: nn.LazyLinear(4), "run the model once"),
    "lazy conv": (lambda: nn.LazyConv1d(4, 1), "run the model once"),
    "weight_norm": (lambda: parametrizations.weight_norm(linear()), "parametrization (WeightNorm)"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(linear()), "(SpectralNorm)"),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), "(Orthogonal)"),
    "own parametrization": (symmetric, "(Symmetric)"),
    "weight_norm of a convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 1)),
        "remove_parametrizations first",
    ),
    "weight_norm of an embedding": (
        lambda: parametrizations.weight_norm(nn.Embedding(4, 4)),
        "remove_parametrizations first",
    ),
    "older weight_norm": (
        lambda: nn.utils.weight_norm(linear()),
        "computed from weight_g and weight_v before each call by a hook (WeightNorm)",
    ),
    "older weight_norm of a convolution": (
        lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 1)),
        "take it off first",
    ),
    "older spectral_norm": (lambda: nn.utils.spectral_norm(linear()), "hook (SpectralNorm)"),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "hook (L1Unstructured)"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, 4), "embedding bags"),
}


@pytest.mark.parametrize("frontend", ["auto", "regions", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_a_row_of_the_dry_run_and_the_rest_is_adapted(name: str, frontend: str) -> None:
    build, reason = CASES[name]
    model = Around(build())
    adapted = lora_fx.rewrite(model, LoraConfig(r=2), frontend=frontend)
    plan = lora_fx.plan(model, LoraConfig(r=2))
    assert [row.name for row in plan] == ["ok"]
    found = {rejection.name: rejection.reason for rejection in plan.rejections}
    assert set(found) == {"bad"}, found
    assert reason in found["bad"]
    assert f"bad: {found['bad']}" in str(plan)
    adapted.ok(torch.randn(2, 4)).sum().backward()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained == ["ok.lora_A.default", "ok.lora_B.default"]
    assert type(lora_fx.merge(adapted).bad) is type(model.bad)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_an_exported_graph_shows_the_products_of_a_parametrization(norm: str) -> None:
    """The norm of a matrix is a product with it, and no application of a layer."""
    model = nn.Sequential(getattr(parametrizations, norm)(linear()), linear(), linear()).eval()
    x = torch.randn(2, 4)
    plan = lora_fx.plan(model, LoraConfig(r=2), (x,), frontend="export")
    assert plan.frontend == "export"
    assert [row.name for row in plan] == ["1"]
    adapted = lora_fx.rewrite(model, LoraConfig(r=2), (x,), frontend="export")
    torch.testing.assert_close(adapted(x), model(x))


@pytest.mark.parametrize("name", CASES)
def test_to_name_it_is_an_error_with_the_reason(name: str) -> None:
    build, reason = CASES[name]
    model = Around(build())
    for targets in (["bad"], ["bad", "ok"], ["ok", "bad.weight"], r"bad"):
        with pytest.raises(NoMatchError) as caught:
            lora_fx.plan(model, LoraConfig(target_modules=targets))
        assert reason in str(caught.value)
    for targets, more in (
        (["ok", "bad"], {"exclude_modules": ["bad"]}),
        (["ok", "bad"], {"modules_to_save": ["bad"]}),
        (r"bad|ok", {}),
    ):
        plan = lora_fx.plan(model, LoraConfig(target_modules=targets, **more))
        assert [row.name for row in plan] == ["ok"]


def test_an_entry_that_selects_something_else_too_is_listed_only() -> None:
    model = nn.Sequential(Around(linear()), Around(nn.LSTM(4, 4)))
    plan = lora_fx.plan(model, LoraConfig(target_modules=["bad"]))
    assert [row.name for row in plan] == ["0.bad"]
    assert [rejection.name for rejection in plan.rejections] == ["1.bad"]
    with pytest.raises(NoMatchError, match=r"'1\.bad': 1\.bad cannot be adapted: torch\.nn\.LSTM"):
        lora_fx.plan(model, LoraConfig(target_modules=["0.bad", "1.bad"]))


def test_many_that_are_refused_for_one_reason_are_one_line() -> None:
    model = nn.Sequential(*(Around(nn.LSTM(4, 4)) for _ in range(5)))
    with pytest.raises(NoMatchError, match=r"'bad': 0\.bad, 1\.bad, 2\.bad and 2 more cannot be"):
        lora_fx.plan(model, LoraConfig(target_modules=["bad", "ok"]))


def test_a_typing_error_is_no_refusal() -> None:
    plan = lora_fx.plan(Around(nn.LSTM(4, 4)), LoraConfig(target_modules=["badd", "ok"]))
    assert plan.unmatched[0].startswith("target_modules 'badd'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parametrized_bias_is_no_obstacle(dtype: torch.dtype) -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    model, x = Around(layer).to(dtype), torch.randn(3, 4, dtype=dtype)
    config = LoraConfig(r=2, target_modules=["bad"], init_lora_weights=False)
    adapted = lora_fx.rewrite(model, config)
    assert_close(lora_fx.merge(adapted)(x), adapted(x), 1e-6 if dtype is torch.float32 else 2e-2)


def test_a_parametrized_layer_inside_attention() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    parametrizations.weight_norm(layer.self_attn.out_proj)
    plan = lora_fx.plan(Around(layer), LoraConfig())
    names = [f"bad.{name}" for name in ("self_attn.q", "self_attn.k", "self_attn.v")]
    assert [row.name for row in plan] == [*names, "bad.linear1", "bad.linear2", "ok"]
    assert [rejection.name for rejection in plan.rejections] == ["bad.self_attn.out_proj"]


def test_a_lazy_layer_runs_beside_an_adapter_and_is_adapted_afterwards() -> None:
    model, x = Around(nn.LazyLinear(4)), torch.randn(3, 7)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    adapted(x).sum().backward()
    assert type(adapted.bad) is nn.Linear
    assert not adapted.bad.weight.requires_grad
    assert adapted.ok.lora_B.default.grad is not None
    model(x)
    assert [row.name for row in lora_fx.plan(model, LoraConfig())] == ["bad", "ok"]


def test_weights_without_values_are_fine() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = Around(linear())
    for model in (fake, Around(linear()).to("meta")):
        plan = lora_fx.plan(model, LoraConfig())
        assert [row.name for row in plan] == ["bad", "ok"]
        assert not plan.rejections


def test_a_mask_of_integers_is_no_weight() -> None:
    model = Around(linear())
    model.register_buffer("position_ids", torch.arange(6).view(2, 3))
    assert not lora_fx.plan(model, LoraConfig()).rejections


def of_bitsandbytes(kind: str) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "4 bits":
        layer: nn.Linear = bnb.nn.Linear4bit(64, 64)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=kind == "16 bits")
    return layer


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_bitsandbytes_quantizes_as_a_layer_is_moved(kind: str) -> None:
    model = nn.Sequential(of_bitsandbytes(kind), nn.Linear(64, 64), nn.Linear(64, 2))
    (found,) = lora_fx.plan(model, LoraConfig(r=2)).rejections
    assert found.name == "0"
    assert "it is not quantized yet (bitsandbytes.nn.modules.Linear" in found.reason
    assert 'model.to("cpu")' in found.reason
    plan = lora_fx.plan(model.to("cpu"), LoraConfig(r=2))
    assert [row.name for row in plan] == ["0", "1"]
    assert not plan.rejections


def test_bitsandbytes_can_hold_weights_of_16_bits() -> None:
    for moved in (False, True):
        layer = of_bitsandbytes("16 bits")
        model = nn.Sequential(layer.to("cpu") if moved else layer, nn.Linear(64, 2))
        with pytest.raises(NoMatchError, match="make the layer with has_fp16_weights=False"):
            lora_fx.plan(model, LoraConfig(target_modules=["0"]))


def test_a_weight_without_elements_is_passed_by() -> None:
    model = Around(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4)))
    found = {one.name: one.reason for one in lora_fx.plan(model, LoraConfig(r=2)).rejections}
    assert found == dict.fromkeys(("bad.0", "bad.1"), "its weight has no elements")
    x = torch.randn(2, 4)
    assert torch.equal(lora_fx.rewrite(model, LoraConfig(r=2))(x), model(x))
