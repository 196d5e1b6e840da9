"""What adapters do over a dense base, they do over a quantized one: compared with its dequantized twin."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.formats import dense, quantization_of
from tests.quantized import IDS, SCHEMES, llama, quantized

SOME = ["nf4 double", "int8 bitsandbytes", "int8 torchao", "int4 torchao"]


def base_of(scheme: str) -> Any:
    return quantized(llama(1), scheme).train()


def twin_of(scheme: str) -> Any:
    """A dense model of the same values."""
    twin = llama(1).train()
    for name, layer in base_of(scheme).named_modules():
        if quantization_of(getattr(layer, "weight", None)):
            twin.get_submodule(name).weight = nn.Parameter(dense(layer.weight, torch.float32))
    return twin


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def stepped(model: nn.Module) -> nn.Module:
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    return model


def rewritten(base: nn.Module, **fields: Any) -> nn.Module:
    fields = {"r": 4, "init_lora_weights": False} | fields
    return lora_fx.rewrite(base, LoraConfig(**fields)).train()


def several(base: nn.Module) -> list[torch.Tensor]:
    model = rewritten(base)
    other = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    lora_fx.add_adapter(model, other, "b")
    seen = [run(model)]
    lora_fx.set_adapter(model, ["default", "b"])
    seen.append(run(model))
    with lora_fx.disable_adapter(model):
        seen.append(run(model))
    with lora_fx.adapter_ids(model, ["default", None]):
        seen.append(run(model))
    with lora_fx.adapter_ids(model, ["b", "default"]):
        seen.append(run(model))
    types: list[Any] = ["cat", "svd", "linear", "ties"]
    for how in types:
        density = 0.5 if how == "ties" else None
        lora_fx.add_weighted_adapter(model, ["default", "b"], [0.7, 0.3], how, how, density=density)
        lora_fx.set_adapter(model, how)
        seen.append(run(model))
    lora_fx.set_adapter(model, "b")
    lora_fx.delete_adapter(model, "default")
    return [*seen, run(model), run(lora_fx.merge(model).train())]


def hotswapped(base: nn.Module) -> list[torch.Tensor]:
    model = rewritten(base)
    lora_fx.prepare_hotswap(model, 8)
    with tempfile.TemporaryDirectory() as folder:
        lora_fx.save_adapter(rewritten(base, r=6, seed=3), folder)
        lora_fx.hotswap_adapter(model, folder)
    return [run(model)]


def trained_in_full(base: nn.Module) -> list[torch.Tensor]:
    model = stepped(rewritten(base, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with tempfile.TemporaryDirectory() as folder:
        lora_fx.save_adapter(model, folder)
        loaded = lora_fx.load_adapter(base, folder).train()
    return [run(model), run(loaded), run(lora_fx.merge(model).train())]


def tokens(base: nn.Module) -> list[torch.Tensor]:
    model = stepped(rewritten(base, target_modules=["q_proj"], trainable_token_indices=[1, 5]))
    stored = any(quantization_of(p) for p in base.parameters())  # the twin has no format
    merged = lora_fx.merge(model).train()
    again = lora_fx.merge(model, requantize=stored).train()
    rows = [m.model.embed_tokens.weight.detach()[[1, 5]] for m in (merged, again)]
    assert torch.equal(*rows)
    return [run(model), run(merged)]


def copied(base: nn.Module) -> list[torch.Tensor]:
    model = rewritten(base)
    read = pickle.loads(pickle.dumps(model))
    return [run(model), run(copy.deepcopy(model)), run(read), run(stepped(read))]


def written(base: nn.Module) -> list[torch.Tensor]:
    model, other = stepped(rewritten(base)), rewritten(base, seed=5)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    # Linear4bit writes its scales, and has nothing that reads them; the base is the same.
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=False)
    return [run(other)]


def unfused(base: nn.Module) -> list[torch.Tensor]:
    return [run(lora_fx.rewrite(base, LoraConfig(r=4, init_lora_weights=False), optimize=False))]


DEEDS = (several, hotswapped, trained_in_full, tokens, copied, written, unfused)


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
@pytest.mark.parametrize("scheme", SOME)
def test_it_goes_as_over_the_dense_twin(
    scheme: str, deed: Callable[[nn.Module], list[torch.Tensor]]
) -> None:
    for found, expected in zip(deed(base_of(scheme)), deed(twin_of(scheme)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_biases_of_quantized_layers_are_trained() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(64, 64)
            self.out = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.out(torch.relu(self.fc(x)))
            return result

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    for scheme in SCHEMES:
        base = quantized(Small(), scheme).train()
        model = lora_fx.rewrite(base, LoraConfig(r=4, bias="all", target_modules=["fc"])).train()
        model(x).square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("bias")}
        assert set(grads) == {"fc.bias", "out.bias"}
        with torch.no_grad():
            for name, grad in grads.items():
                assert grad is not None, name
                assert grad.abs().max() > 0
                model.get_parameter(name).sub_(grad)
            merged = lora_fx.merge(model).train()
            torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=0)
            assert not torch.equal(merged.fc.bias, base.fc.bias)


@pytest.mark.parametrize("scheme", ["nf4", "int8 bitsandbytes", "int8 torchao"])
def test_a_quantized_module_cannot_be_trained_in_full(scheme: str) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(lora_fx.ConfigError, match=r"modules_to_save.*down_proj.*exclude"):
        lora_fx.rewrite(base_of(scheme), config)
