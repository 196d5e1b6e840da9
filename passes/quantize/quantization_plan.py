"""What is to be stored in few bits, and what it saves: the dry run of a quantisation."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from lora_fx.formats.made import Storage
from lora_fx.ir.values import Site

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

    def summary(self) -> str:
        """The weights in one line, and what is left, each reason once."""
        sizes = f"{_mib(self.dense_bytes)} become {_mib(self.bytes)}"
        reasons = Counter(reason for _, reason in self.left)
        first = {reason: name for name, reason in reversed(self.left)}
        lines = [f"{len(self.weights)} weights in {self.storage}: {sizes}"]
        for reason, count in reasons.items():
            more = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  as it is: {first[reason]}{more}: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {
            "format": self.storage.format,
            "library": self.storage.library,
            "block_size": self.storage.block_size,
            "double": self.storage.double,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "weights": [
                {"name": one.name, "shape": list(one.shape), "bytes": one.bytes}
                for one in self.weights
            ],
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
        }

    def __str__(self) -> str:
        width = max(len(one.name) for one in self.weights)
        lines = [self.summary().splitlines()[0]]
        lines += [
            f"  {one.name:{width}}  {one.shape[0]}x{one.shape[1]}  {_mib(one.bytes)}"
            for one in self.weights
        ]
        lines += [f"  as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
