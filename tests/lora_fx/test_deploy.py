"""Training for a storage: the forward rounds, the merge and the file have the same codes and scales."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig, LoraFxError, MergeError
from lora_fx.formats import dense, format_of, quantization_of, storage, stored
from lora_fx.passes.parameters import base_parameters
from lora_fx.runtime import base_parameter
from tests.quantized import IDS, SCHEMES, llama, quantized

FORMATS = ["int4", "int8", "nf4", "bf16"]
# Schemes of tests.quantized with the names of their formats
BASES = {
    "nf4": "nf4",
    "nf4 double": "nf4",
    "int8 bitsandbytes": "int8",
    "int8 torchao": "int8",
    "int4 torchao": "int4",
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return y


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def inputs() -> torch.Tensor:
    return torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "seed": 0} | fields)


def arrays(weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """The codes and scales of a weight, or its values if it is dense."""
    if quantization_of(weight) is None:
        return {"values": weight.detach()}
    known, held = format_of(weight), cast("Any", weight)
    assert known is not None
    if type(weight).__name__ == "Int8Params":
        return {"codes": held.data, "scales": held.row_scales}
    return known.take_apart(weight)[0]


def assert_same_storage(one: nn.Parameter, other: nn.Parameter) -> None:
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert torch.equal(values, right[name]), name


def adapted_values(model: nn.Module, name: str) -> torch.Tensor:
    """``W + s·BA`` in fp64, computed without lora_fx."""
    layer: Any = model.get_submodule(name)
    base = dense(base_parameter(layer, "weight"), torch.float32).detach().double()
    a, b = layer.lora_A.default.detach().double(), layer.lora_B.default.detach().double()
    values: torch.Tensor = base + 2.0 * (b @ a)
    return values


def expected_storage(model: nn.Module, name: str, deploy: str) -> nn.Parameter:
    """The weight that the library makes of ``W + s·BA``."""
    values = adapted_values(model, name).float()
    if deploy == "bf16":
        return nn.Parameter(values.to(torch.bfloat16).float(), False)
    return stored(values, storage(deploy))


@pytest.mark.parametrize("deploy", [*FORMATS, "fp4", "fp16"])
def test_a_dense_mlp_is_merged_to_what_it_was_trained_as(deploy: str) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy).eval()
    merged, report = lora_fx.merge(model, return_report=True)
    for name in ("up", "down"):
        if deploy not in ("fp16",):
            assert_same_storage(
                merged.get_submodule(name).weight, expected_storage(model, name, deploy)
            )
    assert {site.deployed for site in report.sites} == {deploy}
    assert f"2 stored as {deploy}, for which they were trained" in str(report)
    with torch.no_grad():
        outputs = model(inputs())
        assert torch.equal(outputs, merged(inputs()))
    assert not torch.allclose(outputs, lora_fx.rewrite(mlp(), config())(inputs()), atol=1e-6)


def fixed_oracle(model: nn.Module, merged: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients in fp64 of the straight-through estimator: autograd over ``W' + (Q(W') - W')``."""
    layers = {}
    leaves: dict[str, torch.Tensor] = {}
    for name in ("up", "down"):
        layer: Any = model.get_submodule(name)
        base = dense(base_parameter(layer, "weight"), torch.float32).detach().double()
        a = layer.lora_A.default.detach().double().requires_grad_()
        b = layer.lora_B.default.detach().double().requires_grad_()
        leaves |= {f"{name}.lora_A.default": a, f"{name}.lora_B.default": b}
        exact = base + 2.0 * (b @ a)
        values = dense(merged.get_submodule(name).weight, torch.float64)
        layers[name] = exact + (values - exact).detach()
    head: Any = model.get_submodule("head")
    up: Any = model.get_submodule("up")
    wide = x.detach().double().requires_grad_()
    leaves["x"] = wide
    hidden = torch.relu(wide @ layers["up"].T + up.bias.detach().double())
    out = (wide + hidden @ layers["down"].T) @ head.weight.detach().double().T
    out = out + head.bias.detach().double()
    out.square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B"])
@pytest.mark.parametrize("deploy", FORMATS)
def test_gradients_are_those_of_the_straight_through_estimator(deploy: str, frozen: str) -> None:
    model = lora_fx.rewrite(mlp(), config(), deploy=deploy)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    expected = fixed_oracle(model, lora_fx.merge(model), x)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {
        "x": x.grad
    }
    assert found.keys() == {name for name in expected if not frozen or frozen not in name}
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("deploy", FORMATS)
def test_a_llama_is_merged_to_what_it_was_trained_as(deploy: str) -> None:
    model = lora_fx.rewrite(llama(), config(), deploy=deploy).eval()
    merged = lora_fx.merge(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert_same_storage(
            merged.get_submodule(name).weight, expected_storage(model, name, deploy)
        )
    merged.train()  # in eval mode, a layer of bitsandbytes packs its weight for a kernel of the CPU
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("scheme", BASES)
def test_a_quantized_base_is_deployed_to_its_own_format(scheme: str) -> None:
    base = quantized(llama(1), scheme).train()
    before = base(IDS).logits.detach()
    start = lora_fx.rewrite(base, config(init_lora_weights=True), deploy=BASES[scheme]).train()
    if "double" not in scheme:  # whose scales are rounded again
        # The scales of LLM.int8() may change by a unit in the last place.
        close = 1e-6 if scheme == "int8 bitsandbytes" else 0
        torch.testing.assert_close(start(IDS).logits, before, rtol=0, atol=close)
    model = lora_fx.rewrite(base, config(), deploy=BASES[scheme]).train()
    outputs = model(IDS).logits
    merged = lora_fx.merge(model).train()
    assert torch.equal(merged(IDS).logits, outputs)
    again = lora_fx.merge(lora_fx.rewrite(base, config()), requantize=True)
    for name, parameter in merged.named_parameters():
        # The fold sums in fp64 and this function rounds to fp32: the same codes here.
        assert_same_storage(parameter, again.get_parameter(name))
    outputs.square().sum().backward()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in BASES])
def test_other_formats_are_deployed_as_they_are_merged(scheme: str) -> None:
    base = quantized(llama(1), scheme).train()
    plan = lora_fx.plan(base, config())
    names = {row.site.quantized.scheme for row in plan.sites if row.site.quantized}
    model = lora_fx.rewrite(base, config(), deploy=names.pop()).train()
    merged = lora_fx.merge(model).train()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again = lora_fx.merge(lora_fx.rewrite(base, config()), requantize=True)
    for name, parameter in merged.named_parameters():
        assert_same_storage(parameter, again.get_parameter(name))
