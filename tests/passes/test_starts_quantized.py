"""Starts over a quantized base: those go that leave the base as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.formats import dense, quantization_of
from tests.quantized import IDS, SCHEMES, llama, quantized


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_that_changes_the_base_is_refused(start: str) -> None:
    extra: dict[str, Any] = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    config = lora_fx.LoraConfig(seed=0, r=4, init_lora_weights=start, **extra)
    for scheme in ("nf4", "int8 torchao"):
        with pytest.raises(
            lora_fx.ConfigError,
            match=rf"{start}.*q_proj.weight is stored as.*replace_lora_weights_loftq",
        ):
            lora_fx.rewrite(quantized(llama(1), scheme), config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_drawn_starts_are_those_over_a_dense_base(scheme: str, start: bool | str) -> None:
    config = lora_fx.LoraConfig(seed=0, r=4, init_lora_weights=start)
    found = factors(lora_fx.rewrite(quantized(llama(1), scheme), config))
    expected = factors(lora_fx.rewrite(llama(1), config))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# LLM.int8() rounds activations in evaluation, in which the data is looked at.
@pytest.mark.parametrize(
    ("scheme", "atol"), [("nf4", 1e-4), ("int8 bitsandbytes", 0.02), ("int8 torchao", 1e-4)]
)
def test_eva_sees_the_same_inputs(scheme: str, atol: float) -> None:
    base, twin = quantized(llama(1), scheme), llama(1)
    for name, layer in base.named_modules():
        if quantization_of(getattr(layer, "weight", None)):
            weight = nn.Parameter(dense(layer.weight, torch.float32))
            twin.get_submodule(name).weight = weight
    config = lora_fx.LoraConfig(
        seed=0, r=4, init_lora_weights="eva", target_modules=["v_proj", "up_proj"]
    )
    models = [lora_fx.rewrite(one.train(), config).train() for one in (base, twin)]
    for model in models:
        lora_fx.initialize(model, [{"input_ids": IDS}] * 3, progress=False)
    found, expected = map(factors, models)
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, value in found.items():
        assert value.any() or "lora_B" in name
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=0)
