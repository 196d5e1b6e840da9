"""GLoRA of LyCORIS (Chavan et al. 2023, arXiv:2306.07967): ``W + s · (W A1 A2 + B1 B2)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "GLora"]


class GLora(Method):
    """Low-rank product of the weight, and a low-rank product that is added: rank 2r at most."""

    name = "GLoRA"
    does = "low-rank products with and without the weight"
    in_files = True
    scaled = True
    roles = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs, *kernel = layer.shape
        ones = [1] * len(kernel)
        a2 = layer.take("a2.weight", None, inputs, *ones)
        rank = a2.shape[0]
        a1 = layer.take("a1.weight", inputs, rank, *ones)
        b1 = layer.take("b1.weight", out, rank, *ones)
        b2 = layer.take("b2.weight", rank, inputs, *kernel)
        scale = layer.scale(rank)

        def adapted(weight: Tensor) -> Tensor:
            first, second, third, fourth = (
                factor.to(weight).flatten(1) for factor in (a1, a2, b1, b2)
            )
            scaled = torch.einsum("oi...,ij,jk->ok...", weight, first, second)
            return weight + (scaled + (third @ fourth).reshape(weight.shape)) * scale

        yield layer.change(adapted, 2 * rank if not kernel else None)


METHODS = (GLora(),)
