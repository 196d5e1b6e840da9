"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454): ``W + diag(b) B diag(d) A``, in PEFT.

A and B are random, and the same for all layers. A layer uses their first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, ParameterChange
from lora_fx.methods.projections import Projected

__all__ = ["METHODS", "Vera"]


class Vera(Projected):
    """Two vectors for each layer, around random matrices that all layers share."""

    name = "VeRA"
    does = "vectors around random matrices that all layers share"
    peft_type = "VERA"
    roles = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")

    def draw(
        self, layer: Layer, rank: int, largest: tuple[int, int], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """See :class:`Projected`."""
        out, inputs = largest
        a = _uniform(rank, inputs, generator)
        return {"vera_A": a, "vera_B": _uniform(out, rank, generator)}

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs = layer.features
        lambda_b = layer.take("vera_lambda_b", out)
        lambda_d = layer.take("vera_lambda_d", None)
        rank = len(lambda_d)
        a = layer.take("vera_A", rank, inputs, shared=True)
        b = layer.take("vera_B", out, rank, shared=True)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise layer.misfit(f"{layer.keys['vera_lambda_d']} is {[rank]}")

        def delta() -> Tensor:
            left = lambda_b.double()[:, None] * b[:out].double()
            return left @ (lambda_d.double()[:, None] * a[:, :inputs].double())

        yield layer.addition(delta, rank)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


METHODS = (Vera(),)
