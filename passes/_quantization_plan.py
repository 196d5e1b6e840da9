"""What is to be stored in few bits, and what it saves: the dry run of a quantisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from lora_fx._quantization_formats import Storage
from lora_fx.types import Site

__all__ = ["PlannedWeight", "QuantizationPlan"]


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A weight that is to be stored in few bits.

    Attributes:
        site: The operation.
        shape: Rows and columns of the matrix as it will be stored, [out, in].
        dtype: Of its values.
        bytes: What it will take, scales and all.
    """

    site: Site
    shape: tuple[int, int]
    dtype: torch.dtype
    bytes: int

    @property
    def name(self) -> str:
        """FQN of the operation."""
        return self.site.name

    @property
    def dense_bytes(self) -> int:
        """What it takes before."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """What :func:`lora_fx.quantize` would do; print it.

    Attributes:
        storage: The format.
        weights: What would be stored in it.
        left: Names of operations and weights that stay as they are, each with the reason.
    """

    storage: Storage
    weights: tuple[PlannedWeight, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """What the weights will take, scales and all."""
        return sum(one.bytes for one in self.weights)

    @property
    def dense_bytes(self) -> int:
        """What they take before."""
        return sum(one.dense_bytes for one in self.weights)

    def __iter__(self) -> Iterator[PlannedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __str__(self) -> str:
        sizes = f"{_mib(self.dense_bytes)} become {_mib(self.bytes)}"
        lines = [f"{len(self.weights)} weights in {self.storage}: {sizes}"]
        width = max(len(one.name) for one in self.weights)
        lines += [
            f"  {one.name:{width}}  {one.shape[0]}x{one.shape[1]}  {_mib(one.bytes)}"
            for one in self.weights
        ]
        lines += [f"  as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
