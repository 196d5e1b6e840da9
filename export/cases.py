"""A call on which a file is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from lora_fx.export.arguments import FlatModel

__all__ = ["Case", "Cases", "Sizes"]

Sizes: TypeAlias = tuple[tuple[int, ...], ...]
"""The shapes of all inputs."""


@dataclass(frozen=True)
class Case:
    """One call, with what PyTorch makes of it.

    Attributes:
        inputs: The tensors, in the order of the inputs.
        expected: The outputs by name, in order.
        valid: Name of an output to what of it counts, a mask that can be expanded to its shape;
            outputs that are not named count everywhere.
    """

    inputs: Sequence[Tensor]
    expected: Sequence[tuple[str, Tensor]]
    valid: Mapping[str, Tensor] = field(default_factory=dict)


Cases: TypeAlias = Callable[[FlatModel], Iterator[Case]]
