"""How a tensor is stored: PEFT's form of the factors, where that is not the one that a model has.

A form is its stored shape and the two ways between. What is stored in it and cannot be had in a model
is refused in words that follow the name of a key: "is dense, ...".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from lora_fx.errors import CheckpointError

__all__ = [
    "PLAIN",
    "Dense",
    "Form",
    "Plain",
    "Shape",
    "StackedDown",
    "StackedUp",
    "Transposed",
    "for_file",
]


def for_file(value: torch.Tensor) -> torch.Tensor:
    """The same numbers on the CPU, contiguous, with storage of their own."""
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


Shape = tuple[int, ...]


class Form(Protocol):
    """One way of storing a tensor."""

    def stored(self, shape: Shape) -> Shape:
        """The stored shape of a tensor that has this shape in the model."""

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """What is stored; perhaps a view of ``value``."""

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """What was stored, as the model has it; perhaps a view.

        Raises:
            CheckpointError: If no tensor of the model's form holds it, with the reason.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """As it is."""

    def stored(self, shape: Shape) -> Shape:
        """See :class:`Form`."""
        return shape

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return value

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return stored


PLAIN = Plain()


@dataclasses.dataclass(frozen=True, slots=True)
class Transposed:
    """The other way round: the factors of a head are those of the embedding that it is tied to."""

    def stored(self, shape: Shape) -> Shape:
        """See :class:`Form`."""
        return shape[::-1]

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return value.T

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return stored.T


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """The A of a grouped convolution, [r, in/g, *k], stored as PEFT trains it: [r, in, *k].

    Attributes:
        groups: g. The rows of group i see the channels of group i; the rest is zero.
    """

    groups: int

    def stored(self, shape: Shape) -> Shape:
        """See :class:`Form`."""
        return (shape[0], shape[1] * self.groups, *shape[2:])

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        dense = value.new_zeros(self.stored(tuple(value.shape)))
        for rows, channels in self._blocks(dense):
            dense[rows, channels] = value[rows]
        return dense

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        rest = stored.clone()
        parts = []
        for rows, channels in self._blocks(stored):
            parts.append(stored[rows, channels])
            rest[rows, channels] = 0
        if rest.any():
            raise CheckpointError(
                "is dense, as PEFT trains it, and so reads channels that a convolution with "
                f"{self.groups} groups does not: no weight of that shape holds the sum. Train it with "
                "lora_fx, or leave this module out"
            )
        return torch.cat(parts)

    def _blocks(self, dense: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        rows, channels = (size // self.groups for size in dense.shape[:2])
        for group in range(self.groups):
            yield (
                slice(group * rows, (group + 1) * rows),
                slice(group * channels, (group + 1) * channels),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class StackedDown:
    """What comes first of the factors of several experts, [E, r, n], stored as [E·r, n]: PEFT's A.

    Attributes:
        experts: E.
        transposed: Whether the model has [E, n, r]: what is A to PEFT, which goes by the order of the
            weight's dimensions, is B in an operation that reads them the other way round.
    """

    experts: int
    transposed: bool = False

    def stored(self, shape: Shape) -> Shape:
        """See :class:`Form`."""
        experts, rank, size = _turned(shape) if self.transposed else shape
        return (experts * rank, size)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return (value.mT if self.transposed else value).flatten(0, 1)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        value = stored.reshape(self.experts, -1, stored.shape[1])
        return value.mT if self.transposed else value


@dataclasses.dataclass(frozen=True, slots=True)
class StackedUp:
    """What comes second, [E, n, r], stored as [n, r·E] with the expert fastest: PEFT's B.

    Attributes:
        experts: E.
        transposed: Whether the model has [E, r, n]; see :class:`StackedDown`.
    """

    experts: int
    transposed: bool = False

    def stored(self, shape: Shape) -> Shape:
        """See :class:`Form`."""
        experts, size, rank = _turned(shape) if self.transposed else shape
        return (size, rank * experts)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        return (value.mT if self.transposed else value).permute(1, 2, 0).flatten(1, 2)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`Form`."""
        value = stored.reshape(len(stored), -1, self.experts).permute(2, 0, 1)
        return value.mT if self.transposed else value


def _turned(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
