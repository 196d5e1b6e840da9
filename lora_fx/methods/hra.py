"""HRA (Yuan et al. 2024, arXiv:2405.17484): ``W H``, a product with r Householder reflections, in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "Hra"]


class Hra(Method):
    """Product of the weight with reflections along r directions: the change has rank r."""

    name = "HRA"
    does = "products with Householder reflections"
    peft_type = "HRA"
    roles = ("hra_u",)

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        layer.check_dims(2, 4)
        directions = layer.take("hra_u", layer.matrix[1], None)
        orthogonal = layer.setting("apply_GS", bool, False)

        def adapted(weight: Tensor) -> Tensor:
            result = weight.flatten(1)
            for unit in _units(directions.to(weight), orthogonal):
                result = result - 2 * torch.outer(result @ unit, unit)
            return result.reshape(weight.shape)

        yield layer.change(adapted, directions.shape[1])


def _units(directions: Tensor, orthogonal: bool) -> list[Tensor]:
    """Return the directions with length 1; if ``orthogonal``, each is made orthogonal to the earlier ones."""
    units: list[Tensor] = []
    for column in directions.unbind(1):
        direction = column
        if orthogonal:
            for unit in units:
                direction = direction - unit * torch.dot(unit, direction)
        units.append(direction / direction.norm())
    return units


METHODS = (Hra(),)
