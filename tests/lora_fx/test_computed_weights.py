"""Code that computes with an adapted weight, or applies it in several ways, computes with W + s·BA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits


class Head(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.a(x)) @ self.a.weight.T


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(10, 8)

    def forward(self, x):
        return self.a((x @ self.a.weight.t()).argmax(-1)) + x


class TiedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x):
        return F.linear(F.relu(self.a(x)), self.a.weight.t())


class TiedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 4, 3)

    def forward(self, x):
        return F.conv_transpose1d(F.relu(self.a(x)), self.a.weight)


class Thirds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 24)

    def forward(self, x):
        q, k, _ = self.a.weight.chunk(3)
        return self.a(x)[..., :8] + x @ q.T + x @ k.T * 2


class SomeRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.a.weight[:5]).sum(-1, keepdim=True) + self.a(x)


class WrittenClone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        weight = self.a.weight.clone()
        weight[0] = 0
        weight[:, :2].mul_(3)
        return F.linear(x, weight, self.a.bias) + self.a(x)


class Standardized(nn.Conv1d):
    def forward(self, x):
        weight = self.weight
        weight = (weight - weight.mean((1, 2), keepdim=True)) / weight.std((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias)


class NoDiagonal(nn.Linear):
    def forward(self, x):
        weight = self.weight.clone()
        weight.fill_diagonal_(0)
        return F.linear(x, weight, self.bias)


class Clamped(nn.Linear):
    def forward(self, x):
        return F.linear(
            x, self.weight.to(self.weight.dtype, copy=True).clamp_(-0.1, 0.1), self.bias
        )


class Rectified(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.relu(self.weight.clone(), inplace=True), self.bias)


class Slimmed(nn.Linear):
    def forward(self, x):
        return F.linear(x[..., :4], self.weight[:, :4], self.bias)


class Noisy(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.sigma = nn.Parameter(torch.full((8, 8), 0.1))
        self.register_buffer("noise", torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x, self.weight + self.sigma * self.noise, self.bias)


class Signs(nn.Linear):
    """BitNet's layer: the signs of the weight, with the gradient of the weight."""

    def forward(self, x):
        signs = torch.sign(self.weight) * self.weight.abs().mean()
        return F.linear(x, self.weight + (signs - self.weight).detach(), self.bias)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{
        cls.__name__: (cls, (3, 8))
        for cls in (Codebook, TiedEncoder, Thirds, SomeRows, WrittenClone)
    },
    "Head": (Head, ()),
    "TiedConvolution": (TiedConvolution, (2, 3, 9)),
    "Standardized": (lambda: nn.ModuleDict({"a": Standardized(3, 4, 3)}), (2, 3, 9)),
    **{
        cls.__name__: (lambda cls=cls: nn.ModuleDict({"a": cls(8, 8)}), (3, 8))
        for cls in (NoDiagonal, Clamped, Rectified, Slimmed, Noisy, Signs)
    },
}


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_dense_model_of_the_adapted_weight(name: str, inputs: bool) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    base = make().double()
    if isinstance(base, nn.ModuleDict):
        base = nn.Sequential(base["a"])
        target = "0"
    else:
        target = "a"
    x = batch(*shape) if shape else torch.tensor([[1, 2, 3]])
    config = LoraConfig(r=2, seed=0, target_modules=[target])
    adapted = lora_fx.rewrite(base, config, x if inputs else None)
    assert_same_bits(adapted(x), base(x))
    randomize(adapted)
    found = adapted(x)
    merged = lora_fx.merge(adapted)
    weight = f"{target}.weight"
    assert not torch.equal(merged.get_parameter(weight), base.get_parameter(weight))
    assert_close(found, merged(x), 1e-10)
    dense = merged.get_parameter(weight).detach().requires_grad_()
    (exact,) = torch.autograd.grad(
        torch.func.functional_call(merged, {weight: dense}, (x,)).square().sum(), dense
    )
    factors = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(found.square().sum(), list(factors.values()))
    a, b = (next(p for n, p in factors.items() if f"{letter}.default" in n) for letter in "AB")
    exact = exact.flatten(1)
    scale = 4.0  # lora_alpha / r
    if "embedding" in next(iter(factors)):
        wanted = (scale * (exact @ b).T, scale * (exact.T @ a.T))
    else:
        wanted = (scale * (b.flatten(1).T @ exact), scale * (exact @ a.flatten(1).T))
    for grad, factor, one in zip(grads, factors.values(), wanted, strict=True):
        assert_close(grad, one.reshape(factor.shape), 1e-10)


def test_accelerates_hooks_stay_on_the_layers() -> None:
    """As on a model that is spread over devices (device_map): every forward is one of the instance."""
    accelerate = pytest.importorskip("accelerate")
    from tests.stacks.models import IDS, llama

    places = dict.fromkeys(
        ("model.embed_tokens", "model.layers", "model.norm", "lm_head", "model.rotary_emb"), "cpu"
    )
    config = LoraConfig(r=2, seed=0, target_modules=["q_proj", "down_proj"])
    spread = accelerate.dispatch_model(llama(), places, main_device="cpu", force_hooks=True)
    models = [randomize(lora_fx.rewrite(base, config)) for base in (spread, llama())]
    losses = [model(IDS, labels=IDS).loss for model in models]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    named = [dict(model.named_parameters()) for model in models]
    for name, parameter in named[1].items():
        if parameter.requires_grad:
            assert_close(named[0][name].grad, parameter.grad)
    assert_close(lora_fx.merge(models[0])(IDS).logits, models[1](IDS).logits)
