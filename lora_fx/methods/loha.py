"""LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): ``W + s · (A1 B1) ⊙ (A2 B2)``, in PEFT and LyCORIS.

A convolution may have a core tensor T in each half (Tucker form): ``T ×₁ A ×₂ B``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "LoHa"]


class LoHa(Method):
    """Product of two low-rank matrices, element by element: rank r² at most."""

    name = "LoHa"
    does = "products of two low-rank matrices, element by element"
    peft_type = "LOHA"
    in_files = True
    scaled = True
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        rank = layer.take("hada_w1_b", None, None).shape[0]
        halves = [_half(layer, number, rank) for number in (1, 2)]
        scale = layer.scale(rank)

        def delta() -> Tensor:
            first, second = (_product(*half) for half in halves)
            return first * second * scale

        yield layer.addition(delta, rank * rank)


def _half(layer: Layer, number: int, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    roles = [f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}"]
    if roles[2] not in layer.tensors:
        out, inputs = layer.matrix
        return layer.take(roles[0], out, rank), layer.take(roles[1], rank, inputs), None
    core = layer.take(roles[2])
    out, inputs, *kernel = layer.shape
    # PEFT writes the core of a 1d convolution with a second, empty position.
    positions = [*kernel, *[1] * (core.dim() - 2 - len(kernel))]
    layer.take(roles[2], rank, rank, *positions)
    return layer.take(roles[0], rank, out), layer.take(roles[1], rank, inputs), core


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return a.double() @ b.double()
    return torch.einsum("ij...,io,jk->ok...", core.double(), a.double(), b.double())


METHODS = (LoHa(),)
