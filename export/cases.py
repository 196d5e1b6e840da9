"""A call on which a file is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

__all__ = ["Case", "Cases", "Checked", "Runner", "Sizes"]

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


class Checked(Protocol):
    """What a file is compared with: a ``FlatModel``, or one that is handed an adapter."""

    model: nn.Module

    def named(self, tensors: Sequence[Tensor], /) -> list[tuple[str, Tensor]]:
        """The outputs of the call by name."""

    def run(self, call: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """``call(model, *args, **kwargs)``."""


class Runner(Protocol):
    """What runs the file: a session, or one with an adapter."""

    def run(self, inputs: list[Tensor], /) -> dict[str, Any]:
        """The outputs by name."""


Cases: TypeAlias = Callable[[Checked], Iterator[Case]]
