"""OFT (Qiu et al. 2023, arXiv:2306.07280): products of the weight with orthogonal blocks.

PEFT rotates the inputs of a layer (``W Rᵀ``), LyCORIS and kohya its outputs (``R W``). R is the Cayley
transform of skew-symmetric blocks, in PEFT by default a truncated series of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = [
    "METHODS",
    "LycorisOft",
    "Oft",
    "cayley",
    "check_rotation",
    "limit_of",
    "lycoris_rotations",
    "rescaled",
]


def cayley(skew: Tensor) -> Tensor:
    """Return ``(I - S)(I + S)⁻¹`` for each block of a batch: orthogonal, because S is skew-symmetric."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotations: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return rotations


def check_rotation(layer: Layer) -> None:
    """Raise for a grouped convolution, because a rotation of all inputs would mix its groups."""
    layer.check_dims(2, 4)
    if layer.groups > 1:
        raise layer.error(
            f"it has {layer.groups} groups, and the method rotates all inputs together: no weight of its "
            "shape does that"
        )


class Oft(Method):
    """PEFT's form: the inputs of the layer in blocks, each with its rotation."""

    name = "OFT"
    does = "orthogonal factors"
    peft_type = "OFT"
    roles = ("oft_R", "oft_embedding_R")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        embedding = "oft_embedding_R" in layer.tensors
        role = "oft_embedding_R" if embedding else "oft_R"
        if embedding != isinstance(layer.module, nn.Embedding):
            raise layer.error(
                f"{role} does not belong to a {type(layer.module).__name__}: the adapter is for another model"
            )
        check_rotation(layer)
        width = layer.matrix[1]
        kernel = layer.shape[2:]
        if any(size > 1 for size in kernel):
            # PEFT rotates patches of the input and adds their overlaps, already in its first step. This is a
            # convolution with a larger kernel inside, and with other borders.
            raise layer.error(
                f"it is a convolution with a kernel {list(kernel)}. PEFT's OFT sums rotated patches of its "
                "input, and no weight of this shape computes that. Train it with LoRA instead"
            )
        stored = layer.take(role, None, None)
        size = math.isqrt(2 * stored.shape[1]) + 1
        blocks = 1 if layer.setting("block_share", bool, False) else width // size
        if size * (size - 1) // 2 != stored.shape[1] or width % size:
            raise layer.misfit(
                f"{layer.keys[role]} is {list(stored.shape)}, and blocks of {size} do not divide its "
                f"{width} inputs"
            )
        layer.take(role, blocks, None)
        rotations_of = _Rotations(layer, stored, size)

        def adapted(weight: Tensor) -> Tensor:
            rotations = rotations_of.of(weight)
            rows = weight.reshape(-1, width // size, size)
            # The outputs of an embedding are rotated, the inputs of all other layers.
            equation = "nrk,rkc->nrc" if embedding else "nrc,rkc->nrk"
            rotations = rotations.expand(width // size, size, size)
            return torch.einsum(equation, rows, rotations).reshape(weight.shape)

        yield layer.change(adapted)


class _Rotations:
    """Rotations [r, b, b]. A folder stores the entries above the diagonal of S, [r, b (b - 1) / 2]."""

    def __init__(self, layer: Layer, stored: Tensor, size: int) -> None:
        self.stored, self.size = stored, size
        self.radius = layer.setting("eps", (int, float), 6e-5) if layer.config.get("coft") else None
        self.terms = 0
        if layer.setting("use_cayley_neumann", bool, False):
            self.terms = layer.setting("num_cayley_neumann_terms", int, 5)
        self.old_series = _before_018(layer.config)

    def of(self, like: Tensor) -> Tensor:
        """Return the rotations in the dtype of a tensor."""
        entries = self.stored.to(like)
        skew = entries.new_zeros(len(entries), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=like.device)
        skew[:, rows, columns] = entries
        skew = skew - skew.mT
        if self.radius is not None:
            norms = skew.norm(dim=(1, 2), keepdim=True)
            radius = self.radius / math.sqrt(len(skew))
            skew = torch.where(norms <= radius, skew, skew * (radius / norms))
        return self._series(skew) if self.terms else cayley(skew)

    def _series(self, skew: Tensor) -> Tensor:
        """Return the first terms of ``(I + S)(I - S)⁻¹ = I + 2S + 2S² + …``.

        Since version 0.18 PEFT halves the last term, and computes four terms if three are asked for.
        """
        last = self.terms - 1
        if not self.old_series and self.terms > 2:
            last = max(last, 3)
        power = torch.eye(self.size, dtype=skew.dtype, device=skew.device).expand_as(skew)
        total = power.clone()
        for exponent in range(1, last + 1):
            power = power @ skew
            halved = not self.old_series and exponent == last > 2
            total = total + power * (1 if halved else 2)
        return total


def _before_018(config: Mapping[str, object]) -> bool:
    """Return True if a folder was written by PEFT before 0.18, or its configuration has no version."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return version is None or (int(version[1]), int(version[2])) < (0, 18)


class LycorisOft(Method):
    """Form of LyCORIS and kohya: the outputs in blocks, and perhaps a factor for each output."""

    name = "OFT"
    does = "orthogonal factors"
    in_files = True
    roles = ("oft_blocks", "rescale")

    def is_file_layer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if the layer has a single batch of blocks. BOFT has a batch for each of its stages."""
        return "oft_blocks" in tensors and tensors["oft_blocks"].dim() != 4

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        count, size, _ = layer.take("oft_blocks", None, None, None).shape
        if count * size != layer.shape[0]:
            raise layer.misfit(
                f"{layer.keys['oft_blocks']} is {[count, size, size]}, and does not divide its "
                f"{layer.shape[0]} outputs"
            )
        blocks = layer.take("oft_blocks", count, size, size)
        rescale = rescaled(layer)
        limit = limit_of(layer)

        def adapted(weight: Tensor) -> Tensor:
            rotations = lycoris_rotations(blocks.to(weight), limit)
            rows = weight.reshape(count, size, -1)
            return rescale((rotations.mT @ rows).reshape(weight.shape))

        yield layer.change(adapted)


def limit_of(layer: Layer) -> float:
    """Return the limit of the norm of a layer's skew-symmetric blocks, from ``alpha``; 0 for no limit."""
    return float(layer.tensors["alpha"].max()) * layer.shape[0] if "alpha" in layer.tensors else 0.0


def lycoris_rotations(blocks: Tensor, limit: float) -> Tensor:
    """Return the rotations ``(I + Q)(I - Q)⁻¹`` of LyCORIS, with ``Q = X - Xᵀ`` and a limit of its norm."""
    skew = blocks - blocks.mT
    norm = skew.norm() + 1e-8
    if limit > 0 and norm > limit:
        skew = skew * (limit / norm)
    return cayley(-skew)


def rescaled(layer: Layer) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies a weight by the layer's output factors, if the file has them."""
    if "rescale" not in layer.tensors:
        return lambda weight: weight
    factors = layer.take("rescale", layer.shape[0], *[1] * (len(layer.shape) - 1))
    return lambda weight: weight * factors.to(weight)


METHODS = (Oft(), LycorisOft())
