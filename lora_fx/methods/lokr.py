"""LoKr (Yeh et al. 2024, arXiv:2309.14859): ``W + s · (W1 ⊗ W2)``, in PEFT and LyCORIS.

Each of W1 and W2 is stored in full or as a product of two factors. For a convolution, W2 has the kernel, and
may have a core tensor (Tucker form).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "LoKr"]


class LoKr(Method):
    """Kronecker product of two matrices. Its rank is the product of their ranks."""

    name = "LoKr"
    does = "Kronecker products"
    peft_type = "LOKR"
    in_files = True
    scaled = True
    roles = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        first, rank_of_first, r = _first(layer)
        second, rank_of_second, of_second = _second(layer, first.shape)
        scale = layer.scale(r if of_second is None else of_second)
        # For a 1d convolution, PEFT adds no kernel axis to W1, so that its Kronecker product pairs other
        # axes.
        crossed = bool(layer.config) and second.dim() == 3

        def delta() -> Tensor:
            left = first
            if not crossed:
                left = first.reshape(*first.shape, *[1] * (second.dim() - 2))
            return torch.kron(left, second) * scale

        yield layer.addition(delta, None if crossed else rank_of_first * rank_of_second)


def _first(layer: Layer) -> tuple[Tensor, int, int | None]:
    """Return the left factor W1 in fp64, a bound of its rank, and r if W1 is a product; else None."""
    if "lokr_w1" in layer.tensors:
        full = layer.take("lokr_w1", None, None)
        return full.double(), min(full.shape), None
    b = layer.take("lokr_w1_b", None, None)
    a = layer.take("lokr_w1_a", None, b.shape[0])
    return a.double() @ b.double(), min(*a.shape, b.shape[1]), b.shape[0]


def _second(layer: Layer, first: torch.Size) -> tuple[Tensor, int, int | None]:
    """Return the right factor W2 in fp64, a bound of its rank as a matrix, and r if W2 is a product."""
    out, inputs, *kernel = layer.shape
    if out % first[0] or inputs % first[1]:
        raise layer.misfit(f"W1 is {list(first)}, and does not divide a weight {list(layer.shape)}")
    rows, columns = out // first[0], inputs // first[1]
    if "lokr_w2" in layer.tensors:
        full = layer.take("lokr_w2", rows, columns, *kernel)
        return full.double(), min(rows, full[0].numel()), None
    b = layer.take("lokr_w2_b", None, None)
    r = b.shape[0]
    if "lokr_t2" not in layer.tensors:
        width = columns
        for size in kernel:
            width *= size
        a = layer.take("lokr_w2_a", rows, r)
        layer.take("lokr_w2_b", r, width)
        return a.double() @ b.double(), min(rows, r, width), r
    core = layer.take("lokr_t2")
    # PEFT writes the core of a 1d convolution with a second, empty position.
    layer.take("lokr_t2", r, r, *kernel, *[1] * (core.dim() - 2 - len(kernel)))
    a = layer.take("lokr_w2_a", r, rows)
    layer.take("lokr_w2_b", r, columns)
    full = torch.einsum("ij...,io,jk->ok...", core.double(), a.double(), b.double())
    return full, min(rows, r), r


METHODS = (LoKr(),)
