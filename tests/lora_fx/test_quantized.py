"""Adapters over a base that its library has quantized: the operation stays, the branch goes beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.formats import dense, quantization_of
from tests.quantized import IDS, SCHEMES, llama, quantized

BITS = {"int8 bitsandbytes": 8, "int8 torchao": 8, "fp8": 8}

pytestmark = pytest.mark.parametrize("scheme", SCHEMES)


def test_the_plan_shows_the_bits(scheme: str) -> None:
    plan = lora_fx.plan(quantized(llama(), scheme), lora_fx.LoraConfig(r=4))
    assert len(plan.sites) == 14
    assert not plan.rejections
    stored = plan.sites[0].site.quantized
    assert stored is not None
    assert stored.bits == BITS.get(scheme, 4)
    assert stored.shape == (64, 64)
    assert f"64x64 {scheme.split()[0]}" in str(plan)
    assert lora_fx.plan(llama(), lora_fx.LoraConfig(r=4)).base_parameters == plan.base_parameters


@pytest.mark.parametrize("training", [False, True])
def test_a_rewritten_model_begins_as_its_base(scheme: str, training: bool) -> None:
    base = quantized(llama(), scheme).train(True)
    with torch.no_grad():
        expected = base(IDS).logits
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4), IDS).train(training)
    # LLM.int8() rounds the activations, too, once it does not train.
    if scheme == "int8 bitsandbytes" and not training:
        assert float((model(IDS).logits.detach() - expected).abs().max()) < 0.05
    else:
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_those_over_the_dequantized_base(scheme: str, use_dora: bool) -> None:
    base = quantized(llama(), scheme).train()
    config = lora_fx.LoraConfig(r=4, use_dora=use_dora, init_lora_weights=False)
    model = lora_fx.rewrite(base, config).train()
    plain = llama().train()
    for name, layer in base.named_modules():
        if quantization_of(getattr(layer, "weight", None)) is not None:
            weight = nn.Parameter(dense(layer.weight, torch.float32))
            plain.get_submodule(name).weight = weight
    reference = lora_fx.rewrite(plain, config, optimize=False).train()
    reference.load_state_dict(
        {n: p for n, p in model.state_dict().items() if ".lora_" in n}, strict=False
    )
    for one in (model, reference):
        one(IDS).logits.square().mean().backward()
    found = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_nothing_dequantized_is_kept_for_the_backward(scheme: str) -> None:
    base = quantized(llama(), scheme).train()
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4)).train()
    shapes = {tuple(p.site.weight_shape) for p in lora_fx.plan(base, lora_fx.LoraConfig(r=4))}
    floats: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            floats.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(IDS)
    assert floats
    assert not [s for s in floats if s in shapes or s[::-1] in shapes]
