"""Opacus: gradients of single samples are those of a loop over samples, or refused before the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close

pytestmark = pytest.mark.stack
X = torch.arange(15).view(5, 3) % 11
Y = torch.arange(5) % 4
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["fc", "out"]},
    "DoRA": {"target_modules": ["fc", "out"], "use_dora": True},
    "embedding": {"target_modules": ["embed", "out"]},
}


class Net(nn.Module):
    """An embedding and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.embed(x)).relu()).mean(1)


def build(case: str = "LoRA", **options: Any) -> Any:
    torch.manual_seed(0)
    return randomize(lora_fx.rewrite(Net(), LoraConfig(r=2, **CASES[case]), **options)).train()


def loss_of(model: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


def one_by_one(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of a loop over samples."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss_of(model, x[None], y[None]), list(named.values()))
        for x, y in zip(X, Y, strict=True)
    ]
    return {
        name: torch.stack(row) for name, row in zip(named, zip(*rows, strict=True), strict=True)
    }


def by_samples(model: Any) -> dict[str, torch.Tensor]:
    """Those of torch.func, all at once."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(lambda given: functional_call(model, values, (given,)), x[None], y[None])

    return dict(vmap(grad(loss), in_dims=(None, 0, 0))(named, X, Y))


def found_in(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}


def compare(model: Any, wanted: dict[str, torch.Tensor]) -> None:
    found = found_in(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value)


@pytest.mark.feature("Opacus, expanded weights", "train")
def test_expanded_weights() -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    model = build(optimize=False)
    wanted = one_by_one(model)
    loss_of(opacus.wrap_model(model, grad_sample_mode="ew"), X, Y).backward()
    compare(model, wanted)


@pytest.mark.feature("Opacus, torch.func", "train")
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_torch_func_in_a_private_step(case: str) -> None:
    opacus = pytest.importorskip("opacus")
    model = build(case)
    wanted = one_by_one(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=len(X))
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="no_op",
    )
    for name, value in by_samples(private._module).items():
        private._module.get_parameter(name).grad_sample = value
    compare(model, wanted)
    optimizer.step()
    norms = sum(value.flatten(1).square().sum(1) for value in wanted.values()).sqrt()
    clip = (1 / (norms + 1e-6)).clamp(max=1)
    for name, value in wanted.items():
        mean = torch.einsum("n,n...->...", clip, value) / len(X)
        assert_close(model.get_parameter(name), before[name] - 0.1 * mean)


@pytest.mark.feature("Opacus, hooks", "train", refused=True)
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("case", CASES)
def test_hooks_are_refused(mode: str, case: str) -> None:
    opacus = pytest.importorskip("opacus.grad_sample")
    model = build(case)
    wanted = one_by_one(model)
    with pytest.raises(ConfigError, match=r"optimize=False.*no_op"):
        opacus.wrap_model(model, grad_sample_mode=mode)
    # The way out is open for the same model.
    private = opacus.wrap_model(model, grad_sample_mode="no_op")
    found = by_samples(private._module)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value)
