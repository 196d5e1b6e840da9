"""Where a section measures: on which devices and in which dtypes, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lora_fx.tools.bench.hardware import computes_bf16, devices
from lora_fx.tools.bench.measure import Progress, portion

__all__ = ["Place", "at_each", "places"]

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Place:
    """A device and a dtype; as a string, what the tables call it: "cpu, float32".

    Attributes:
        device: Where models and inputs are.
        dtype: Of weights and activations.
    """

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def on_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"


def places(*, half: bool) -> tuple[Place, ...]:
    """Every device with fp32, then those that compute in bf16 with that.

    Args:
        half: Whether bf16 is wanted.
    """
    found = [Place(device, torch.float32) for device in devices()]
    if half:
        found += [Place(device, torch.bfloat16) for device in devices() if computes_bf16(device)]
    return tuple(found)


def at_each(
    where: Sequence[Place],
    work: Callable[[Place, Progress | None], Found],
    progress: Progress | None,
    title: str = "",
) -> dict[str, Found]:
    """Does the same work at each place.

    Args:
        where: The places.
        work: Gets the place, and the progress to call for its part.
        progress: The whole's.
        title: Stands before the name of the contender in the progress.

    Returns:
        What the work gave, by the place's name.
    """
    return {
        str(place): work(place, portion(progress, index, len(where), title))
        for index, place in enumerate(where)
    }
