"""Random matrices that all layers share: those in a folder, or those that PEFT draws when it loads one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method

__all__ = ["Projected"]


class Projected(Method):
    """A method over random matrices. A folder has them, or the seed of their generator."""

    def derive_shared(
        self, layers: Sequence[Layer], shared: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the matrices of the file or, if it has none, draw them with the configured seed."""
        layer = layers[0]
        if shared or layer.setting("save_projection", bool, True):
            return shared
        rank, seed = layer.setting("r", int), layer.setting("projection_prng_key", int)
        generator = torch.Generator("cpu").manual_seed(seed)
        sizes = [layer.features for layer in layers]
        largest = max(out for out, _ in sizes), max(inputs for _, inputs in sizes)
        drawn = self.draw(layer, rank, largest, generator)
        return {role: _as_in_model(matrix, layers) for role, matrix in drawn.items()}

    @abstractmethod
    def draw(
        self, layer: Layer, rank: int, largest: tuple[int, int], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Draw the random matrices in the same order as PEFT, and return them by role.

        Args:
            layer: The first layer, for settings.
            rank: r.
            largest: The largest numbers of outputs and of inputs of any layer.
            generator: The random generator, with the seed set.
        """


def _as_in_model(projection: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Round a random matrix to the dtype of each layer, as PEFT does, and return it in fp32."""
    for layer in layers:
        dtype = layer.module.get_parameter("weight").dtype
        if dtype.is_floating_point:
            projection = projection.to(dtype)
    return projection.float()
