"""torchvision's Swin transformers: qkv and proj are sites, although one function applies both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import seeded, torchvision_swin, torchvision_swin3d

pytest.importorskip("torchvision")

CONFIG = LoraConfig(r=2, target_modules=["attn.qkv", "attn.proj"])
MODELS: dict[str, Callable[..., Any]] = {
    "v1": torchvision_swin,
    "v2": lambda **options: torchvision_swin(2, **options),
    "3d": torchvision_swin3d,
}


@pytest.fixture(params=MODELS)
def build(request) -> Callable[..., Any]:
    return MODELS[request.param]


def test_both_weights_of_every_layer_are_sites(build) -> None:
    model, _ = build()
    plan = lora_fx.plan(model, CONFIG)
    wanted = {f"{name}.weight" for name, _ in model.named_modules() if ".attn." in name}
    assert {row.site.weight for row in plan} == {
        name for name in wanted if "cpb_mlp" not in name and name.split(".")[-2] in ("qkv", "proj")
    }
    assert all(row.site.bias for row in plan)
    assert not [r for r in plan.rejections if r.name.endswith(("qkv", "proj"))]


@pytest.mark.parametrize(
    "frontend",
    [
        "auto",
        "auto, inputs",
        "regions",
        "symbolic",
        # Minutes: torch.export reasons about windows of any size.
        pytest.param("export", marks=pytest.mark.slow),
    ],
)
def test_adapted_is_merged(build, frontend: str) -> None:
    model, x = build(stochastic_depth_prob=0.0)
    name, _, inputs = frontend.partition(", ")
    sample = x if inputs or name == "export" else None
    adapted = lora_fx.rewrite(model, CONFIG, sample, frontend=name)
    with torch.no_grad():
        assert_same_bits(adapted(x), model(x))
        randomize(adapted)
        merged = lora_fx.merge(adapted)
        assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
        for size in (x.shape[-1], 40):
            other = x[..., :size]
            assert_close(merged(other), adapted(other), 1e-5)
            assert (adapted(other) - model(other)).abs().max() > 1e-3


def test_gradients_are_those_of_the_merged_weight(build) -> None:
    model, x = build()
    model, x = model.double(), x.double()
    adapted = randomize(lora_fx.rewrite(model, CONFIG))
    adapted(x).square().sum().backward()
    factors = dict(adapted.named_parameters())
    weights, leaves = {}, {}
    for row in lora_fx.plan(model, CONFIG):
        names = (f"{row.name}.lora_A.default", f"{row.name}.lora_B.default")
        a, b = (factors[name].detach().requires_grad_() for name in names)
        leaves |= dict(zip(names, (a, b), strict=True))
        weights[row.site.weight] = model.get_parameter(row.site.weight) + row.scale * b @ a
    torch.func.functional_call(model, weights, (x,)).square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.abs().max() > 0
        assert_close(factors[name].grad, leaf.grad, 1e-9)


def test_dropout_draws_what_the_layer_draws(build) -> None:
    model, x = build(dropout=0.2, attention_dropout=0.3)
    adapted = lora_fx.rewrite(model, CONFIG).train()
    model.train()
    with torch.no_grad():
        assert_same_bits(seeded(adapted)(x), seeded(model)(x))
        assert not torch.equal(adapted(x), adapted(x))


def test_it_compiles_whole(build) -> None:
    model, x = build()
    adapted = randomize(lora_fx.rewrite(model, CONFIG))
    torch.compiler.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    expected = adapted(x)
    assert_close(compiled(x), expected, 1e-6)
    compiled(x).sum().backward()


def test_a_trained_bias_of_v2_has_no_part_for_k() -> None:
    model, x = torchvision_swin(2)
    config = LoraConfig(r=2, target_modules=["attn.qkv"], bias="lora_only")
    adapted = lora_fx.rewrite(model, config)
    adapted(x).sum().backward()
    bias = adapted.features[1][0].attn.qkv.bias
    q, k, v = bias.grad.chunk(3)
    assert q.any()
    assert not k.any()
    assert v.any()


def test_a_setting_that_is_changed_behind_the_graph_counts() -> None:
    model, x = torchvision_swin()
    adapted = randomize(lora_fx.rewrite(model, CONFIG)).eval()
    merged = lora_fx.merge(adapted)
    before = adapted(x)
    for one in (adapted, merged):
        one.features[1][0].attn.shift_size = [1, 1]
    assert_close(adapted(x), merged(x), 1e-5)
    assert not torch.allclose(adapted(x), before)


def test_a_subclass_or_a_namesake_is_not_taken_for_it() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    class Other(ShiftedWindowAttention):
        pass

    class Namesake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 4)

        def forward(self, x):
            return self.qkv(x)

    Namesake.__module__ = ShiftedWindowAttention.__module__
    Namesake.__qualname__ = ShiftedWindowAttention.__qualname__
    plan = lora_fx.plan(
        nn.ModuleDict({"a": Other(8, [2, 2], [0, 0], 2), "b": Namesake()}),
        LoraConfig(target_modules=["b.qkv", "a.qkv", "a.proj"]),
    )
    assert [row.name for row in plan] == ["a.qkv", "a.proj", "b.qkv"]
    other = Other(8, [2, 2], [0, 0], 2).eval()
    x = torch.randn(1, 4, 4, 8)
    adapted = randomize(lora_fx.rewrite(other, LoraConfig(r=2, target_modules=["qkv", "proj"])))
    assert_close(adapted(x), lora_fx.merge(adapted)(x), 1e-5)
