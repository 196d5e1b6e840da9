"""DoRA by the textbook: the weight ``m / ‖W + s·BA‖ ∘ (W + s·BA)`` put in the place of W, in fp64."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo import Form

__all__ = ["directed", "explicit_dora", "magnitude_of", "randomise_magnitudes"]


def magnitude_of(form: Form, model: nn.Module) -> nn.Parameter:
    """The magnitude of the rewritten `form.model()`."""
    owner = model.op if form.weight == "weight" else getattr(model.op, f"{form.weight}_lora")
    return owner.lora_magnitude_vector.default


def randomise_magnitudes(model: nn.Module) -> nn.Module:
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
    name = f"op.{form.weight}"
    old = model.get_parameter(name).detach()
    delta = form.delta(a, b)
    weight = directed(form, old.reshape(delta.shape) + scale * delta, m).reshape(old.shape)
    return torch.func.functional_call(model, {name: weight}, (x,))
