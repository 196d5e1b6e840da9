"""What every pattern has to satisfy, checked for one form of a linear operation at a time.

The oracle knows nothing of lora_fx: it is the user's own model, in fp64, with `W + s·BA` put in the
place of its weight by `torch.func.functional_call`, and autograd through that.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lora_fx
from tests.numerics import assert_close, assert_same_bits, relative_error, ulp_error
from tests.zoo import Form, seeded

__all__ = [
    "Letters",
    "adapt",
    "check_adapted",
    "check_dense",
    "check_gradients",
    "check_merged",
    "check_merged_half",
    "check_untouched",
    "dense_weights",
    "explicit",
    "randomize",
]


def adapt(form: Form, model: nn.Module, r: int | None = None, **options: Any) -> nn.Module:
    """The form's model with an adapter on its one site."""
    config = lora_fx.LoraConfig(
        **{
            "r": 2 * form.groups if r is None else r,
            "lora_alpha": 6,
            "target_modules": [form.site],
            **options,
        }
    )
    plan = lora_fx.plan(model, config)
    assert [(row.name, row.site.pattern) for row in plan] == [(form.site, form.pattern)]
    return lora_fx.rewrite(model, config)


@seeded
def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Random factors, as after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in f".{name}":
                parameter.normal_(0.0, std)
    return model


def scale_of(model: nn.Module) -> float:
    (adapter,) = model._lora_fx.adapters.values()
    return adapter.sites[0].scale


def explicit(
    form: Form, model: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float, x: torch.Tensor
) -> torch.Tensor:
    """The output of the plain `model` with the weight `W + s·BA`."""
    name = f"op.{form.weight}"
    old = model.get_parameter(name).detach()
    weight = old + scale * form.delta(a, b).reshape(old.shape)
    return torch.func.functional_call(model, {name: weight}, (x,))


def reference(form: Form, model: nn.Module, adapted: nn.Module) -> torch.Tensor:
    a, b = (f.detach().double() for f in form.factors(adapted))
    exact = copy.deepcopy(model).double()
    return explicit(form, exact, a, b, scale_of(adapted), form.x(torch.float64))


def check_untouched(form: Form) -> None:
    """Before training no bit of the output is another."""
    model, x = form.model(), form.x()
    found = adapt(form, model)(x)
    assert relative_error(found, model(x)) <= 1e-6
    # torch.matmul folds a batch into one product or not, and so rounds otherwise, according to
    # whether the weight wants a gradient: bits are compared with a frozen base.
    assert_same_bits(found, model.requires_grad_(False)(x))


def check_adapted(form: Form, dtype: torch.dtype, **options: Any) -> None:
    """The adapted output is that of `W + s·BA`."""
    model = form.model().to(dtype)
    adapted = randomize(adapt(form, model, **options))
    assert_close(adapted(form.x(dtype)), reference(form, model, adapted))


def check_gradients(form: Form) -> None:
    """Gradients of A and B are those of the explicit formula, and nothing else has one."""
    model = form.model().double()
    adapted = randomize(adapt(form, model))
    x = form.x(torch.float64)
    factors = form.factors(adapted)
    cotangent = seeded(torch.randn_like)(model(x))
    adapted(x).backward(cotangent)
    assert all(p.grad is None for p in adapted.parameters() if not any(p is f for f in factors))
    a, b = (f.detach().clone().requires_grad_() for f in factors)
    assert all(p.grad is None for p in model.parameters())
    explicit(form, model, a, b, scale_of(adapted), x).backward(cotangent)
    assert_close([f.grad for f in factors], [a.grad, b.grad], 1e-12)


def check_merged(form: Form, dtype: torch.dtype) -> None:
    """The merged model is of the user's class and computes what the adapted one does."""
    model = form.model().to(dtype)
    adapted = randomize(adapt(form, model))
    merged = lora_fx.merge(adapted)
    x = form.x(dtype)
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert_close(merged(x), adapted(x))
    assert_close(merged(x), reference(form, model, adapted))


def check_merged_half(form: Form, dtype: torch.dtype) -> None:
    """Every merged weight of a half-precision base is within half a unit in the last place."""
    model = form.model().to(dtype)
    adapted = randomize(adapt(form, model))
    a, b = form.factors(adapted)
    assert a.dtype == b.dtype == torch.float32
    name = f"op.{form.weight}"
    old = model.get_parameter(name).detach().double()
    with torch.no_grad():
        delta = form.delta(a.double(), b.double()).reshape(old.shape)
        exact = old + scale_of(adapted) * delta
    merged, report = lora_fx.merge(adapted, return_report=True)
    found = merged.get_parameter(name)
    assert found.dtype == dtype
    assert ulp_error(found, exact) <= 0.5
    assert report.max_ulp <= 0.5


@dataclasses.dataclass(frozen=True)
class Letters:
    """What the dimensions of a weight are for, a letter each, as einsum has it.

    Attributes:
        weight: All of them, as the weight is stored.
        kept: The outputs.
        summed: The inputs. What is neither counts experts.
    """

    weight: str
    kept: str
    summed: str

    def delta(self, a: torch.Tensor, b: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """``B A`` in the weight's shape, by einsum."""
        sizes = dict(zip(self.weight, shape, strict=True))
        kept = [letter for letter in self.weight if letter in self.kept]
        summed = [letter for letter in self.weight if letter in self.summed]
        shared = [letter for letter in self.weight if letter not in self.kept + self.summed]
        before = [sizes[letter] for letter in shared]
        down = a.reshape(*before, -1, *(sizes[letter] for letter in summed))
        up = b.reshape(*before, *(sizes[letter] for letter in kept), -1)
        left, right = "".join([*shared, *kept, "z"]), "".join([*shared, "z", *summed])
        return torch.einsum(f"{left},{right}->{self.weight}", up, down)

    def scaled(self, weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        """DoRA: every output's weights with that magnitude."""
        axes = [axis for axis, letter in enumerate(self.weight) if letter in self.summed]
        norm = weight.detach().square().sum(axes, keepdim=True).sqrt()
        return weight * magnitude.reshape(norm.shape) / norm


def dense_weights(
    model: nn.Module, adapted: nn.Module, letters: Mapping[str, Letters]
) -> dict[str, torch.Tensor]:
    """``W + s·BA`` of every adapted weight of `model`, differentiable in the factors of `adapted`."""
    weights = {name: model.get_parameter(name).detach() for name in letters}
    for adapter, entry in adapted._lora_fx.adapters.items():
        for row in entry.sites:
            name = row.site.weight
            holder = adapted.get_submodule(row.site.holder)
            a, b = (holder.get_parameter(f"lora_{letter}.{adapter}") for letter in "AB")
            delta = letters[name].delta(a, b, weights[name].shape)
            weights[name] = weights[name] + row.scale * delta
            if row.kind == "dora":
                magnitude = holder.get_parameter(f"lora_magnitude_vector.{adapter}")
                weights[name] = letters[name].scaled(weights[name], magnitude)
    return weights


def check_dense(
    model: nn.Module,
    adapted: nn.Module,
    letters: Mapping[str, Letters],
    x: torch.Tensor,
    tolerance: float = 1e-10,
) -> None:
    """Outputs, gradients and the merged model are those of the dense weights in the plain model."""
    weights = dense_weights(model, adapted, letters)
    exact_x, found_x = (x.clone().requires_grad_() for _ in range(2))
    exact = torch.func.functional_call(model, weights, (exact_x,))
    found = adapted(found_x)
    assert found.shape == exact.shape
    assert_close(found, exact, tolerance)
    cotangent = seeded(torch.randn_like)(exact)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert_close(
        torch.autograd.grad(found, [*trained, found_x], cotangent),
        torch.autograd.grad(exact, [*trained, exact_x], cotangent),
        tolerance,
    )
    merged = lora_fx.merge(adapted)
    for name, weight in weights.items():
        assert_close(merged.get_parameter(name), weight, tolerance)
    assert_close(merged(x), exact, tolerance)
