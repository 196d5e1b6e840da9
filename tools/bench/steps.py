"""Training steps: the loop that measures contenders at each place, and the columns of their tables."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import (
    FROZEN,
    Contenders,
    Settings,
    built,
    model_floor,
    targets_of,
)
from lora_fx.tools.bench.counted import (
    Memory,
    alive_bytes,
    count_operations,
    measure_memory,
    saved_bytes,
)
from lora_fx.tools.bench.measure import (
    Place,
    Ratio,
    Run,
    Sample,
    Size,
    allocator_peak,
    kernel_launches,
    places,
    ratio,
)
from lora_fx.tools.bench.section import Chart, Section, no_charts
from lora_fx.tools.bench.workloads import Workload

__all__ = [
    "COLUMNS",
    "Measured",
    "Row",
    "Steps",
    "loss_of",
    "mebibytes",
    "on_one_thread",
    "section_of",
]


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
        alive: Bytes that a forward leaves, counted without asking autograd; None as for ``saved``.
    """

    sample: Sample
    saved: int | None = None
    memory: Memory | None = None
    operations: int | None = None
    launches: int | None = None
    allocated: int | None = None
    alive: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Contenders on one workload.

    Attributes:
        floor: F, or None where no simple count of products gives it.
        steps: By name, the frozen one among them.
        model: What the table calls the workload.
        where: Device and dtype.
        look: What a section has looked at besides.
    """

    floor: float | None
    steps: Mapping[str, Step]
    model: str = ""
    where: str = ""
    look: Any = None

    @property
    def adapted(self) -> list[str]:
        """Names of the contenders with adapters."""
        return [name for name in self.steps if not name.startswith(FROZEN)]

    def overhead(self, name: str) -> Ratio:
        """O."""
        return ratio(self.steps[name].sample, self.steps[FROZEN].sample)

    def saved_beyond(self, name: str) -> int | None:
        """Bytes saved for backward beyond what the frozen step saves."""
        saved, frozen = self.steps[name].saved, self.steps[FROZEN].saved
        return None if saved is None or frozen is None else saved - frozen


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: what was measured together, and which of it."""

    measured: Measured
    name: str

    @property
    def step(self) -> Step:
        """The contender's."""
        return self.measured.steps[self.name]


Look = Callable[[nn.Module, nn.Module, Mapping[str, nn.Module], Mapping[str, Any]], Any]
"""Gets the model, what the contenders are over, the contenders and their losses."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a section of steps measures.

    Attributes:
        workloads: The models and batches.
        contenders: What runs, by size and place.
        where: The places.
        seconds: After this long no further turn begins.
        floor: Whether F can be counted.
        base: What is done to the model before adapters are added.
        wrap: What is done to the contenders but the frozen one (``torch.compile``); then only time is
            measured of them, since hooks and modes change what is compiled.
        look: What else is looked at, once the times are taken.
        one_thread: Whether to take the time that one thread computes, which other processes do not change.
    """

    workloads: Callable[[Size], Sequence[Workload]]
    contenders: Callable[[Size, Place], Contenders]
    where: Callable[[Size], Sequence[Place]] = lambda size: places(half=size is Size.FULL)
    seconds: float = 60.0
    floor: bool = True
    base: Callable[[nn.Module], nn.Module] = lambda model: model
    wrap: Callable[[nn.Module], nn.Module] | None = None
    look: Look | None = None
    one_thread: bool = False

    def measure(self, run: Run) -> dict[str, Measured]:
        """Results by place, and by model before it where there are several."""
        models = self.workloads(run.size)
        several = len(models) > 1
        found = {}
        for workload, part in run.each(models, lambda one: one.short if several else ""):
            for place, here in part.each(self.where(run.size)):
                name = f"{workload.title}, {place}" if several else str(place)
                found[name] = self._measured(workload, place, here)
        return found

    def _measured(self, workload: Workload, place: Place, run: Run) -> Measured:
        model = workload.make().to(place.device, place.dtype)
        inputs = workload.on(place)
        floor = None
        if self.floor:
            settings = Settings()
            names = targets_of(model, settings)
            floor = model_floor(model, names, settings.r, lambda one: one(**inputs))
        base = self.base(model)
        models = built(self.contenders(run.size, place), base, inputs)
        running = models
        if self.wrap is not None:
            # What was compiled before would count towards the limit on compilations of one forward.
            torch.compiler.reset()
            running = {n: one if n == FROZEN else self.wrap(one) for n, one in models.items()}
        losses = {name: loss_of(one, inputs) for name, one in running.items()}
        turns = {name: (models[name].zero_grad, _backward(loss)) for name, loss in losses.items()}
        with on_one_thread() if self.one_thread else contextlib.nullcontext():
            clock = time.thread_time if self.one_thread else time.perf_counter
            timed = run.times(turns, place.device, seconds=self.seconds, clock=clock)
        steps = {
            name: _counted(timed[name], one, losses[name], place.device)
            if running[name] is one
            else Step(timed[name])
            for name, one in models.items()
        }
        if self.wrap is not None:
            torch.compiler.reset()
        look = None if self.look is None else self.look(model, base, models, losses)
        return Measured(floor, steps, workload.title, str(place), look)


def _counted(
    sample: Sample, model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Step:
    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(loss())

    held: list[Memory] = []
    operations = count_operations(lambda: held.append(measure_memory(step)))
    return Step(
        sample,
        saved_bytes(model, loss),
        held[0],
        operations,
        kernel_launches(step, device),
        allocator_peak(step, device, model.zero_grad),
        alive_bytes(loss),
    )


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Lets operators compute on the thread that calls them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loss_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A forward that gives the loss; an input that requires a gradient gets a new one each time."""

    def loss() -> Tensor:
        given = {
            name: value.detach().requires_grad_() if value.requires_grad else value
            for name, value in inputs.items()
        }
        found: Tensor = model(**given).loss
        return found

    return loss


def _backward(loss: Callable[[], Tensor]) -> Callable[[Any], None]:
    return lambda _: torch.autograd.backward(loss())


Column = Callable[[Row], str]


def mebibytes(value: int | None) -> str:
    """A size as a table shows it, in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def _efficiency(row: Row) -> str:
    """η, F / O, as a table shows it."""
    if row.name.startswith(FROZEN):
        return ""
    floor, overhead = row.measured.floor, row.measured.overhead(row.name).median
    return "–" if floor is None else f"{100 * floor / overhead:.0f} %"


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


COLUMNS: Mapping[str, Column] = {
    "where": lambda row: row.measured.where,
    "contender": lambda row: row.name,
    "median (quartiles)": lambda row: str(row.step.sample),
    "O (quartiles)": lambda row: (
        "1" if row.name == FROZEN else str(row.measured.overhead(row.name))
    ),
    "η": _efficiency,
    "saved beyond frozen, MiB": lambda row: mebibytes(row.measured.saved_beyond(row.name)),
    "peak MiB": lambda row: mebibytes(row.step.memory.peak if row.step.memory else None),
    "ATen ops": lambda row: _number(row.step.operations),
    "kernel launches": lambda row: _number(row.step.launches),
    "allocator peak MiB": lambda row: mebibytes(row.step.allocated),
}
"""Of the tables of steps; the last two are CUDA's."""


def section_of(
    name: str,
    steps: Steps,
    columns: Mapping[str, Column] = COLUMNS,
    pictures: Callable[[Any], Mapping[str, Chart]] = no_charts,
) -> Section:
    """A section of steps.

    Args:
        name: Its name.
        steps: What is measured.
        columns: Of its table: what each says of a row.
        pictures: As for a section.
    """

    def cells(results: Mapping[str, Measured]) -> Iterator[list[str]]:
        for measured in results.values():
            for contender in measured.steps:
                row = Row(measured, contender)
                yield [column(row) for column in columns.values()]

    return Section(name, tuple(columns), steps.measure, cells, pictures)
