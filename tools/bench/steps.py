"""Training steps of models, measured: what the sections about whole models have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import BUILDERS, FROZEN, NO_DROPOUT, Settings, targets_of
from lora_fx.tools.bench.counted import count_operations
from lora_fx.tools.bench.floor import model_floor
from lora_fx.tools.bench.hardware import allocator_peak, kernel_launches, synchronizer
from lora_fx.tools.bench.measure import Progress, Ratio, Sample, interleaved, ratio
from lora_fx.tools.bench.memory import Memory, measure_memory
from lora_fx.tools.bench.places import Place
from lora_fx.tools.bench.saved import saved_bytes
from lora_fx.tools.bench.workloads import Workload

__all__ = ["Measured", "Step", "compare", "loss_of", "measure", "name_of"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of one contender takes.

    Attributes:
        sample: Times.
        saved: Bytes kept between forward and backward, or None where hooks do not see them.
        memory: Bytes that its operations allocate, likewise.
        operations: ATen operations, likewise.
        launches: Kernels, on CUDA.
        allocated: Peak of the allocator, on CUDA.
    """

    sample: Sample
    saved: int | None = None
    memory: Memory | None = None
    operations: int | None = None
    launches: int | None = None
    allocated: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Contenders on one workload.

    Attributes:
        floor: F, or None where no simple count of products gives it.
        steps: By name, the frozen one among them.
    """

    floor: float | None
    steps: Mapping[str, Step]

    def overhead(self, name: str) -> Ratio:
        """O."""
        return ratio(self.steps[name].sample, self.steps[FROZEN].sample)

    def saved_beyond(self, name: str) -> int | None:
        """Bytes saved for backward beyond what the frozen step saves."""
        saved, frozen = self.steps[name].saved, self.steps[FROZEN].saved
        return None if saved is None or frozen is None else saved - frozen


def name_of(contender: str, dropout: float) -> str:
    """How a table names a contender with dropout."""
    return f"{contender}, p = {dropout:g}"


def measure(
    workload: Workload,
    names: Iterable[str],
    *,
    dropouts: Iterable[float],
    place: Place,
    repeats: int,
    seconds: float = math.inf,
    progress: Progress | None = None,
    settings: Settings | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Measured:
    """Builds contenders over one base and measures them against each other.

    Args:
        workload: The model and the batch.
        names: Keys of :data:`lora_fx.tools.bench.contenders.BUILDERS`; the frozen model is added.
        dropouts: Each contender with adapters is measured with each.
        place: Where.
        repeats: Counted turns.
        seconds: As for :func:`lora_fx.tools.bench.measure.interleaved`.
        progress: Likewise.
        settings: Of the adapters, but for the dropout.
        wrap: What becomes of the contenders that have adapters (``torch.compile``); then only time is
            measured of them, since hooks and modes change what is compiled.
    """
    base = workload.make().to(place.device, place.dtype)
    inputs = workload.on(place)
    settings = dataclasses.replace(settings or Settings(), example_inputs=inputs)
    models = _models(base, names, dropouts, settings)
    wrapped = {
        name: wrap(model) if wrap is not None and name != FROZEN else model
        for name, model in models.items()
    }
    losses = {name: loss_of(model, inputs) for name, model in wrapped.items()}
    floor = model_floor(base, targets_of(base, settings), settings.r, lambda model: model(**inputs))
    counted = {name for name, model in models.items() if wrapped[name] is model}
    return compare(
        models,
        losses,
        floor=floor,
        device=place.device,
        repeats=repeats,
        seconds=seconds,
        progress=progress,
        counted=counted,
    )


def compare(
    models: Mapping[str, nn.Module],
    losses: Mapping[str, Callable[[], Tensor]],
    *,
    floor: float | None,
    device: torch.device,
    repeats: int,
    seconds: float = math.inf,
    progress: Progress | None = None,
    counted: Collection[str] | None = None,
) -> Measured:
    """Measures contenders that are there.

    Args:
        models: By name, the frozen one among them.
        losses: What each one's step goes back from.
        floor: F.
        device: Where they are.
        repeats: Counted turns.
        seconds: As for :func:`lora_fx.tools.bench.measure.interleaved`.
        progress: Likewise.
        counted: Of which more than time is measured; of all by default.
    """
    timed = interleaved(
        {name: (models[name].zero_grad, _backward(loss)) for name, loss in losses.items()},
        repeats=repeats,
        seconds=seconds,
        synchronize=synchronizer(device),
        progress=progress,
    )
    return Measured(
        floor,
        {
            name: _counted(timed[name], model, losses[name], device)
            if counted is None or name in counted
            else Step(timed[name])
            for name, model in models.items()
        },
    )


def _models(
    base: nn.Module, names: Iterable[str], dropouts: Iterable[float], settings: Settings
) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys((FROZEN, *names)):
        if name.startswith(FROZEN):
            models[name] = BUILDERS[name](base, settings)
            continue
        for dropout in dropouts:
            if dropout and name in NO_DROPOUT:
                continue
            now = dataclasses.replace(settings, lora_dropout=dropout)
            models[name_of(name, dropout)] = BUILDERS[name](base, now)
    return {name: model.train() for name, model in models.items()}


def _counted(
    sample: Sample, model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Step:
    def step() -> None:
        model.zero_grad()
        _backward(loss)(None)

    held: list[Memory] = []
    operations = count_operations(lambda: held.append(measure_memory(step)))
    return Step(
        sample,
        saved_bytes(model, loss),
        held[0],
        operations,
        kernel_launches(step, device),
        allocator_peak(step, device, model.zero_grad),
    )


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A forward that gives the loss."""

    def loss() -> Tensor:
        found: Tensor = model(**inputs).loss
        return found

    return loss


def _backward(loss: Callable[[], Tensor]) -> Callable[[Any], None]:
    def step(_: Any) -> None:
        torch.autograd.backward(loss())

    return step
