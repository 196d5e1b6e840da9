"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): sums of scaled random bases, of full rank, in PEFT.

``W + s · Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ)``. The bases A and B are the same for all layers. A has as many columns as
the smaller of a layer's numbers of inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.methods.base import Layer, ParameterChange
from lora_fx.methods.projections import Projected

__all__ = ["METHODS", "RandLora"]


class RandLora(Projected):
    """Scales for random bases that all layers share. The change has full rank."""

    name = "RandLoRA"
    does = "scaled random bases that all layers share"
    peft_type = "RANDLORA"
    roles = ("randlora_lambda", "randlora_gamma")
    shared = ("randlora_A", "randlora_B")

    def draw(
        self, layer: Layer, rank: int, largest: tuple[int, int], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """See :class:`Projected`."""
        small, large = min(largest), max(largest)
        count = -(-small // rank)
        if layer.config.get("sparse") or layer.config.get("very_sparse"):
            sparsity = math.sqrt(small) if layer.config.get("very_sparse") else 3
            a = _ternary((rank, 1, small), sparsity, generator)
            b = _ternary((large, count, rank), sparsity, generator)
        else:
            a = _uniform((rank, 1, small), generator)
            b = torch.cat([_uniform((large, 1, rank), generator) for _ in range(count)], dim=1)
        return {"randlora_A": a / a.std(), "randlora_B": b / b.std()}

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs = layer.features
        small, large = min(out, inputs), max(out, inputs)
        scales = layer.take("randlora_lambda", None, None)
        rank, count = scales.shape
        gamma = layer.take("randlora_gamma", count, small)
        a = layer.take("randlora_A", rank, 1, small, shared=True)
        b = layer.take("randlora_B", large, count, rank, shared=True)
        if a.shape[0] != rank or b.shape[2] != rank:
            raise layer.misfit(f"{layer.keys['randlora_lambda']} is {[rank, count]}")
        scale = float(layer.setting("randlora_alpha", (int, float))) / rank

        def delta() -> Tensor:
            left = b[:large, :count].double().flatten(1)
            right = scales.double()[..., None] * a[:, :, :small].double() * gamma.double()
            # As in PEFT, the columns of B are ordered by base, then rank, but the rows of A by rank, then
            # base.
            product = left @ right.flatten(0, 1) * scale
            return product if small == inputs else product.T

        yield layer.addition(delta)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random numbers in bf16, as PEFT draws them."""
    values = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)


def _ternary(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """Return -1, 0 and 1 with probabilities 1/2s, 1 - 1/s and 1/2s (Li et al. 2006)."""
    draws = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    share = 1 / (2 * sparsity)
    values = torch.zeros_like(draws)
    values[draws < share] = -1
    values[draws > 1 - share] = 1
    return values


METHODS = (RandLora(),)
