"""Training steps: the loop that measures contenders at each placement, and the columns of their tables."""

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
    Placement,
    Ratio,
    Run,
    Sample,
    Size,
    allocator_peak,
    kernel_launches,
    placements,
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
    """Costs of one contender's step.

    Attributes:
        sample: Times.
        saved: Bytes kept between forward and backward, or None if hooks do not see them.
        memory: Bytes that its operations allocate, or None as for ``saved``.
        operations: Number of ATen operations, or None as for ``saved``.
        launches: Number of kernels, on CUDA.
        allocated: Peak of the allocator, on CUDA.
        alive: Bytes that a forward leaves allocated, counted without autograd; None as for ``saved``.
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
    """Results of the contenders on one workload.

    Attributes:
        floor: F, or None if no simple count of products gives it.
        steps: Steps by contender, including the frozen one.
        model: Name of the workload in the table.
        where: Device and dtype.
        look: Additional measurements of the section.
    """

    floor: float | None
    steps: Mapping[str, Step]
    model: str = ""
    where: str = ""
    look: Any = None

    @property
    def adapted(self) -> list[str]:
        """Return the names of the contenders with adapters."""
        return [name for name in self.steps if not name.startswith(FROZEN)]

    def overhead(self, name: str) -> Ratio:
        """Return O, the ratio of a contender's time to that of the frozen step."""
        return ratio(self.steps[name].sample, self.steps[FROZEN].sample)

    def saved_beyond(self, name: str) -> int | None:
        """Return the bytes saved for backward beyond those of the frozen step."""
        saved, frozen = self.steps[name].saved, self.steps[FROZEN].saved
        return None if saved is None or frozen is None else saved - frozen


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: one contender of a measurement."""

    measured: Measured
    name: str

    @property
    def step(self) -> Step:
        """Return the contender's step."""
        return self.measured.steps[self.name]


Look = Callable[[nn.Module, nn.Module, Mapping[str, nn.Module], Mapping[str, Any]], Any]
"""Function of the model, the base of the contenders, the contenders and their losses."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """Settings of a section that measures steps.

    Attributes:
        workloads: Returns the models and batches.
        contenders: Returns the contenders, by size and placement.
        where: Returns the placements.
        seconds: Time after which no further turn begins.
        floor: True if F can be counted.
        base: Changes the model before adapters are added.
        wrap: Wraps all contenders but the frozen one (``torch.compile``). Only their time is measured,
            because hooks and modes change the compiled code.
        look: Takes additional measurements after the times.
        one_thread: True to measure the CPU time of one thread, which other processes do not affect.
    """

    workloads: Callable[[Size], Sequence[Workload]]
    contenders: Callable[[Size, Placement], Contenders]
    where: Callable[[Size], Sequence[Placement]] = lambda size: placements(half=size is Size.FULL)
    seconds: float = 60.0
    floor: bool = True
    base: Callable[[nn.Module], nn.Module] = lambda model: model
    wrap: Callable[[nn.Module], nn.Module] | None = None
    look: Look | None = None
    one_thread: bool = False

    def measure(self, run: Run) -> dict[str, Measured]:
        """Measure every model at every placement, and return results by placement.

        If there are several models, the name of the model stands before the placement.
        """
        models = self.workloads(run.size)
        several = len(models) > 1
        results = {}
        for workload, part in run.each(models, lambda item: item.short if several else ""):
            for placement, placement_run in part.each(self.where(run.size)):
                name = f"{workload.title}, {placement}" if several else str(placement)
                results[name] = self._measured(workload, placement, placement_run)
        return results

    def _measured(self, workload: Workload, placement: Placement, run: Run) -> Measured:
        model = workload.make().to(placement.device, placement.dtype)
        inputs = workload.on(placement)
        floor = None
        if self.floor:
            settings = Settings()
            names = targets_of(model, settings)
            floor = model_floor(model, names, settings.r, lambda module: module(**inputs))
        base = self.base(model)
        models = built(self.contenders(run.size, placement), base, inputs)
        running = models
        if self.wrap is not None:
            # Earlier compilations would count towards the recompile limit of one forward.
            torch.compiler.reset()
            running = {n: net if n == FROZEN else self.wrap(net) for n, net in models.items()}
        losses = {name: loss_of(net, inputs) for name, net in running.items()}
        turns = {name: (models[name].zero_grad, _backward(loss)) for name, loss in losses.items()}
        with on_one_thread() if self.one_thread else contextlib.nullcontext():
            clock = time.thread_time if self.one_thread else time.perf_counter
            timed = run.times(turns, placement.device, seconds=self.seconds, clock=clock)
        steps = {
            name: _counted(timed[name], net, losses[name], placement.device)
            if running[name] is net
            else Step(timed[name])
            for name, net in models.items()
        }
        if self.wrap is not None:
            torch.compiler.reset()
        look = None if self.look is None else self.look(model, base, models, losses)
        return Measured(floor, steps, workload.title, str(placement), look)


def _counted(
    sample: Sample, model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Step:
    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(loss())

    memories: list[Memory] = []
    operations = count_operations(lambda: memories.append(measure_memory(step)))
    return Step(
        sample,
        saved_bytes(model, loss),
        memories[0],
        operations,
        kernel_launches(step, device),
        allocator_peak(step, device, model.zero_grad),
        alive_bytes(loss),
    )


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Run PyTorch's operators on one thread, while the context is open."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loss_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs a model and returns its loss.

    Inputs that require a gradient are new leaves in each call, so that gradients do not add up.
    """

    def loss() -> Tensor:
        batch = {
            name: value.detach().requires_grad_() if value.requires_grad else value
            for name, value in inputs.items()
        }
        result: Tensor = model(**batch).loss
        return result

    return loss


def _backward(loss: Callable[[], Tensor]) -> Callable[[Any], None]:
    return lambda _: torch.autograd.backward(loss())


Column = Callable[[Row], str]


def mebibytes(value: int | None) -> str:
    """Format a size in MiB for a table."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def _efficiency(row: Row) -> str:
    """Format the efficiency η = F / O of a contender for a table."""
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
"""Columns of the tables of steps. The last two are for CUDA."""


def section_of(
    name: str,
    steps: Steps,
    columns: Mapping[str, Column] = COLUMNS,
    pictures: Callable[[Any], Mapping[str, Chart]] = no_charts,
) -> Section:
    """Return a section of steps.

    Args:
        name: Name of the section.
        steps: Settings of the measurement.
        columns: Columns of its table, each with a function that formats the cell of a row.
        pictures: Makes the pictures, as in :class:`Section`.
    """

    def cells(results: Mapping[str, Measured]) -> Iterator[list[str]]:
        for measured in results.values():
            for contender in measured.steps:
                row = Row(measured, contender)
                yield [column(row) for column in columns.values()]

    return Section(name, tuple(columns), steps.measure, cells, pictures)
