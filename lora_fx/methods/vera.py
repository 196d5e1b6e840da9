"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454): ``W + diag(b) B diag(d) A``, in PEFT.

A and B are random, and the same for all layers. A layer uses their first columns and rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "Vera", "as_in_model"]


class Vera(Method):
    """Two vectors for each layer, around random matrices that all layers share."""

    name = "VeRA"
    does = "vectors around random matrices that all layers share"
    peft_type = "VERA"
    roles = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")

    def derive_shared(
        self, layers: Sequence[Layer], shared: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return A and B: those of the file, or, if it has none, those of the seed in the configuration."""
        layer = layers[0]
        if shared or layer.setting("save_projection", bool, True):
            return shared
        sizes = [layer.features for layer in layers]
        rank, seed = layer.setting("r", int), layer.setting("projection_prng_key", int)
        generator = torch.Generator("cpu").manual_seed(seed)
        a = _uniform(rank, max(inputs for _, inputs in sizes), generator)
        b = _uniform(max(out for out, _ in sizes), rank, generator)
        return {"vera_A": as_in_model(a, layers), "vera_B": as_in_model(b, layers)}

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


def as_in_model(projection: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Return a random matrix with the rounding of PEFT, which keeps it in the dtypes of the layers."""
    for layer in layers:
        dtype = layer.module.get_parameter("weight").dtype
        if dtype.is_floating_point:
            projection = projection.to(dtype)
    return projection.float()


METHODS = (Vera(),)
