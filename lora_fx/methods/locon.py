"""LoRA and LoCon in files of kohya, LyCORIS and diffusers: ``W + s · B A``, with magnitudes or core tensors.

Most such files are loaded as they are. A file with other layers in addition, with core tensors (Tucker form)
or with a magnitude for each input is converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "MID", "LoCon"]

MID = "lora_mid.weight"


class LoCon(Method):
    """Low-rank product, for a convolution perhaps with a core tensor between A and B."""

    name = "LoCon"
    does = "low-rank products, with a kernel between A and B (Tucker form)"
    in_files = True
    scaled = True
    # A and B have other names in files: see lora_fx.methods.layer_names.
    roles = ("A", "B", MID, "bias")

    def is_file_layer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if the layer has A, B or a core tensor."""
        return any(role in tensors for role in ("A", "B", MID))

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs, *kernel = layer.shape
        rank = layer.take("A").shape[0]
        scale = layer.scale(rank)
        b = layer.take("B")
        _check_matrix(layer, "B", b, (out, rank))
        a = layer.take("A")
        core = layer.take(MID, rank, None, *kernel) if MID in layer.tensors else None
        if core is None:
            _check_matrix(layer, "A", a, (rank, layer.matrix[1]))
        else:
            layer.take(MID, b.shape[1], rank, *kernel)
            _check_matrix(layer, "A", a, (rank, inputs))

        def delta() -> Tensor:
            up, down = b.double().flatten(1), a.double().flatten(1)
            if core is None:
                return up @ down * scale
            return torch.einsum("ij...,oi,jk->ok...", core.double(), up, down) * scale

        yield layer.addition(delta, rank)
        if "bias" in layer.tensors:
            bias = layer.take("bias", out)
            yield layer.change(lambda value: value + bias.to(value) * scale, leaf="bias")


def _check_matrix(layer: Layer, role: str, value: Tensor, expected: tuple[int, int]) -> None:
    if value.dim() < 2 or (value.shape[0], value[0].numel()) != expected:
        raise layer.misfit(
            f"{layer.keys[role]} is {list(value.shape)}, and as a matrix {role} is {list(expected)}"
        )


METHODS = (LoCon(),)
