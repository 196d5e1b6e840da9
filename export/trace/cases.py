"""A call on which a file is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from lora_fx.export.trace.arguments import Arguments

__all__ = ["Case", "Cases", "Checked", "Outputs", "Runner", "Sizes", "Widenable"]

Sizes: TypeAlias = tuple[tuple[int, ...], ...]
"""The shapes of all inputs."""

Outputs: TypeAlias = list[tuple[str, Tensor]]
"""What a call gives, by name and in order."""


@dataclass(frozen=True)
class Case:
    """One call, with what PyTorch makes of it.

    Attributes:
        inputs: The tensors, in the order of the inputs and in the dtypes of the file.
        expected: The outputs by name, in order.
        valid: Name of an output to what of it counts, a mask that can be expanded to its shape;
            outputs that are not named count everywhere.
        note: What there is to say of the values, "" for fresh ones.
    """

    inputs: Sequence[Tensor]
    expected: Outputs
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""


class Checked(Protocol):
    """What a file is compared with: a model under the call that it is exported for."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    def named(self, tensors: Sequence[Tensor], /) -> Outputs:
        """The outputs of the call by name."""

    def run(self, call: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """``call(model, *args, **kwargs)``."""


class Widenable(Checked, Protocol):
    """A ``FlatModel``, or one that is handed an adapter: it can be had over another model, too."""

    @property
    def arguments(self) -> Arguments:
        """The call that it was made for."""

    def over(self, model: nn.Module, /) -> Checked:
        """The same call of ``model``, a copy of its model with weights in fp32."""


class Runner(Protocol):
    """What runs the file: a session, or one with an adapter."""

    def run(self, inputs: list[Tensor], /) -> dict[str, Any]:
        """The outputs by name."""


Cases: TypeAlias = Callable[[Checked], Iterator[Case]]
"""Calls of a model. What comes out of one and goes into the next has the dtype of the file's input:
the model may compute with more digits."""
