"""DoRA and a bias on B beside PEFT: outputs, gradients and merged weights of the same adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import lora_fx
from tests.numerics import assert_close
from tests.zoo import hf_conv1d, sample, seeded

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 6), lambda: sample(3, 4, 6)),
    "linear, wide": (lambda: nn.Linear(6, 9), lambda: sample(3, 4, 6)),
    "linear, no bias": (lambda: nn.Linear(9, 6, bias=False), lambda: sample(3, 4, 9)),
    "Conv1D": (lambda: hf_conv1d(7, 5), lambda: sample(2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: sample(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1), lambda: sample(2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), lambda: sample(2, 2, 3, 4, 5)),
    "embedding": (
        lambda: nn.Embedding(11, 6, padding_idx=2),
        lambda: torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]]),
    ),
}
CASES = [
    (name, variant)
    for variant in ("use_dora", "lora_bias")
    for name in LAYERS
    if variant == "use_dora" or (name != "embedding" and "no bias" not in name and name != "conv3d")
]


def pair(name: str, variant: str, tmp_path) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """PEFT's model after some training, and ours from its folder."""
    build, inputs = LAYERS[name]
    model = Around(seeded(build)())
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["op"],
        fan_in_fan_out=name == "Conv1D",
        **{variant: True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(tmp_path)
    return theirs, lora_fx.load_adapter(model, tmp_path), inputs()


class Around(nn.Module):
    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x):
        return torch.tanh(self.op(x))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of what is trained, in an order that both libraries have in common."""
    model.zero_grad()
    model(x).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds = ("embedding_A", "embedding_B", "magnitude", "lora_A", "lora_B.default.bias")
            kind = next((k for k in kinds if k in name), "lora_B")
            found["lora_bias" if "bias" in name else kind] = parameter.grad.clone()
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_outputs_gradients_and_merged_weights_are_pefts(name: str, variant: str, tmp_path) -> None:
    theirs, ours, x = pair(name, variant, tmp_path)
    assert_close(ours(x), theirs(x), 1e-5)
    found, exact = gradients(ours, x), gradients(theirs, x)
    assert len(exact) == 3
    assert_close(found, exact, 1e-5)
    merged, reference = lora_fx.merge(ours), theirs.merge_and_unload()
    assert_close(merged.op.weight, reference.op.weight, 1e-5)
    if variant == "lora_bias":
        assert_close(merged.op.bias, reference.op.bias, 1e-5)
    assert_close(merged(x), reference(x), 1e-5)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_they_start_where_pefts_start(name: str, variant: str) -> None:
    model = Around(seeded(LAYERS[name][0])())
    options = {"r": 4, "target_modules": ["op"], variant: True}
    ours = lora_fx.rewrite(model, lora_fx.LoraConfig(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    for own, their in (("magnitude", "magnitude"), ("lora_bias", "lora_B.default.bias")):
        a = [p for n, p in ours.named_parameters() if own in n]
        b = [p for n, p in theirs.named_parameters() if their in n]
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-6)


def test_a_merge_that_peft_cannot_make() -> None:
    """PEFT drops the dilation of a convolution's adapter; against the decomposed weight instead."""
    model = seeded(lambda: Around(nn.Conv2d(4, 6, 3, dilation=2)))().double()
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, use_dora=True, target_modules=["op"]))
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(adapted):
            parameter.add_(0.3)
    layer = adapted.op
    a, b, m = (
        getattr(layer, name).default.detach()
        for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    turned = model.op.weight.detach() + 4.0 * torch.einsum("or,rihw->oihw", b[..., 0, 0], a)
    exact = copy.deepcopy(model)
    with torch.no_grad():
        exact.op.weight.copy_(
            m.view(-1, 1, 1, 1) / turned.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * turned
        )
    x = sample(2, 4, 7, 8, dtype=torch.float64)
    assert_close(adapted(x), exact(x))
    assert_close(lora_fx.merge(adapted)(x), exact(x))
