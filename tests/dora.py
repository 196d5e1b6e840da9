"""DoRA by the textbook: the weight ``m / ‖W + s·BA‖ ∘ (W + s·BA)`` put in the place of W, in fp64."""

from __future__ import annotations

import torch
from torch import nn

from tests.algebra import scale_of
from tests.zoo import Form

__all__ = [
    "adapted_weight",
    "directed",
    "explicit_dora",
    "magnitude_of",
    "randomize_magnitudes",
    "steer",
]


def magnitude_of(form: Form, model: nn.Module) -> nn.Parameter:
    """The magnitude of the rewritten `form.model()`."""
    owner = model.op if form.weight == "weight" else getattr(model.op, f"{form.weight}_lora")
    return owner.lora_magnitude_vector.default


def randomize_magnitudes(model: nn.Module) -> nn.Module:
    """Magnitudes as after some training: other sizes, and a few of the other sign."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                factor = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.mul_(
                    factor.flatten().index_fill(0, torch.tensor([1]), -0.7).view_as(factor)
                )
    return model


def directed(form: Form, turned: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """``m / ‖turned‖ ∘ turned`` by output feature; the norm is a constant."""
    if form.kind == "conv transposed":
        parts = [
            _scaled(part, part_m, 1)
            for part, part_m in zip(
                turned.chunk(form.groups), m.flatten().chunk(form.groups), strict=True
            )
        ]
        return torch.cat(parts)
    return _scaled(turned, m.flatten(), 1 if form.kind in ("in_out", "embedding") else 0)


def _scaled(turned: torch.Tensor, m: torch.Tensor, axis: int) -> torch.Tensor:
    others = [dim for dim in range(turned.dim()) if dim != axis]
    norm = turned.detach().square().sum(others, keepdim=True).sqrt()
    shape = [-1 if dim == axis else 1 for dim in range(turned.dim())]
    return m.view(shape) / norm * turned


def adapted_weight(
    form: Form,
    model: nn.Module,
    scale: float,
    a: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The weight of the plain `model` with an adapter, of DoRA if it has a magnitude, by its name."""
    name = f"op.{form.weight}"
    old = model.get_parameter(name).detach()
    delta = form.delta(a, b)
    weight = old.reshape(delta.shape) + scale * delta
    weight = weight if m is None else directed(form, weight, m)
    return {name: weight.reshape(old.shape)}


def explicit_dora(
    form: Form,
    model: nn.Module,
    a: torch.Tensor,
    b: torch.Tensor,
    m: torch.Tensor,
    scale: float,
    x: torch.Tensor,
) -> torch.Tensor:
    """The output of the plain `model` with the decomposed weight."""
    weight = adapted_weight(form, model, scale, a, b, m)
    return torch.func.functional_call(model, weight, (x,))


def steer(form: Form, model: nn.Module, adapted: nn.Module) -> nn.Module:
    """Magnitudes whose gains are about 1, and one of the other sign: none is near 0."""
    m = magnitude_of(form, adapted)
    a, b = (factor.detach() for factor in form.factors(adapted))
    ones = torch.ones_like(m).requires_grad_()
    (name,) = turned = adapted_weight(form, model, scale_of(adapted), a, b)
    unit = adapted_weight(form, model, scale_of(adapted), a, b, ones)
    # Σ W² / ‖W‖ by feature is the norm.
    (norms,) = torch.autograd.grad((turned[name] * unit[name]).sum(), ones)
    gains = torch.linspace(0.6, 1.5, m.numel(), dtype=m.dtype)
    gains[m.numel() // 2] *= -1
    with torch.no_grad():
        m.copy_(norms * gains.view_as(m))
    return adapted
