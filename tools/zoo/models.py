"""What a model of the zoo is, and how its weights get values that mean something.

Libraries start some layers at zero and scale others for widths in the thousands: at a width of 16
their outputs would hardly depend on the input, and nothing could be said about training or merging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Built", "Entry", "Inputs", "call", "ids", "images"]

Inputs: TypeAlias = "dict[str, Any] | tuple[Any, ...]"
"""Keyword or positional arguments of one call."""

Built: TypeAlias = "tuple[nn.Module, Inputs]"

_SEED = 1234
_SMALL_SCALE = 0.1  # below it a scale that is the same everywhere (LayerScale) hides its branch
_VARIATION = 0.2  # of what replaces a value that is the same everywhere


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: Unique, and what ``--only`` looks at.
        group: The table it stands in.
        make: Makes the model and the arguments of one call, at a small size.
        loss: What training makes small, of the output; by default the distance of every floating
            tensor in it from fixed random numbers.
        targets: What is adapted; by default every linear operation but the head.
        note: What is different about this model and expected to be; shown in the table.
    """

    name: str
    group: str
    make: Callable[[], Built]
    loss: Callable[[Any], torch.Tensor] | None = None
    targets: tuple[str, ...] | None = None
    note: str = ""

    def build(self) -> Built:
        """The model in eval mode, and its inputs: the same numbers every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model, inputs = self.make()
            _scale_up(wake(model))
            _settle_statistics(model, inputs)
        return model.eval(), inputs


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Calls a model with its inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def ids(vocabulary: int = 40, length: int = 6, batch: int = 2) -> torch.Tensor:
    """Token ids [batch, length] without the special ones, which are below 3."""
    return torch.randint(3, vocabulary, (batch, length))


def images(size: int = 32, channels: int = 3, batch: int = 2) -> torch.Tensor:
    """Random images [batch, channels, size, size]."""
    return torch.randn(batch, channels, size, size)


def wake(model: nn.Module) -> nn.Module:
    """Draws whatever is the same everywhere, in place: behind a zero no adapter has an effect.

    Layer scales, the last norm of a residual branch, heads and gates start at zero or nearly so; a bias of
    zeros, and a norm's gain of ones, could be lost without a sign of it.

    Returns:
        The model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.numel() == 1:
                parameter.copy_(torch.where(parameter == 0.0, 0.5, parameter))
            elif float(parameter.min()) == float(parameter.max()):
                _vary(parameter, name.rpartition(".")[2])
            elif parameter.dim() == 1 and "bias" not in name:
                largest = float(parameter.abs().max())
                parameter.mul_(0.5 / largest if largest < _SMALL_SCALE else 1.0)
    return model


def _scale_up(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and parameter.numel() > 1:
                wanted, spread = _usual_spread(parameter), float(parameter.std())
                parameter.mul_(wanted / spread if 0.0 < spread < wanted / 2 else 1.0)


def _usual_spread(parameter: nn.Parameter) -> float:
    return 1 / math.sqrt(max(1, parameter.numel() // parameter.shape[0]))


def _vary(parameter: nn.Parameter, name: str) -> None:
    """Draws a parameter that is the same everywhere: matrices, biases, and scales around a value."""
    value = float(parameter.flatten()[0])
    if value == 0.0 and "bias" in name:
        parameter.normal_(0.0, _VARIATION / 2)
    elif value == 0.0 and parameter.dim() > 1:
        parameter.normal_(0.0, _usual_spread(parameter))
    else:
        parameter.fill_(value if abs(value) >= _SMALL_SCALE else 0.5)
        parameter.mul_(1 + _VARIATION * torch.randn_like(parameter).clamp(-2, 2))


def _settle_statistics(model: nn.Module, inputs: Inputs) -> None:
    """Batch norm half as after training: with the statistics of what it sees.

    The other half stays as at the start. Two images at one pixel each have hardly a variance, and
    dividing by it would blow up every rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.5
    with torch.no_grad():
        call(model.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
