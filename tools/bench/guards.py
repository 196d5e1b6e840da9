"""Cost of the safety checks: the guards of the graphs at each call, and the watch of the first step.

A graph's guard checks at each call that the values read by its trace are unchanged. The watch looks for code
that reads an adapted weight without its adapter. It runs in the first call of each form: the model's mode and
the classes and sizes of the arguments. Later calls only check that the watch has run.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.passes.graph import conditions_of, generated
from lora_fx.runtime import CODE, GRAPH, disarm
from lora_fx.tools.bench.contenders import BUILDERS, EXPORTED, OURS, Settings
from lora_fx.tools.bench.measure import Placement, Ratio, Run, Sample, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.steps import loss_of
from lora_fx.tools.bench.workloads import Workload, resnet, small_llama

__all__ = ["AGAIN", "OFF", "SECOND", "SECTION", "GuardTimes"]

FIRST, SECOND, LATER = "first step, watched", "second step", "fifth step"
OFF, AGAIN = "a step without a watch", "a step without a watch, again (A/A)"

_FORWARD, _CONDITIONS = "forward", "guards"
_PASSES = 20
_SECONDS = 40.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Times of one model's guards and of its forward.

    Attributes:
        title: Name in the table.
        graphs: Number of graphs that a forward runs.
        conditions: Number of comparisons in their guards.
        forward: Times of a forward, including its guards.
        guards: Times of the guards alone.
    """

    title: str
    graphs: int
    conditions: int
    forward: Sample
    guards: Sample

    @property
    def portion(self) -> Ratio:
        """Return the share of the forward's time that the guards take."""
        return ratio(self.guards, self.forward)


@dataclasses.dataclass(frozen=True)
class GuardTimes:
    """Times of guards, and of the steps that guards and the watch are a part of.

    Attributes:
        cases: Results of the guards.
        steps: Times of steps, by name.
    """

    cases: tuple[Case, ...]
    steps: Mapping[str, Sample]


def _run(run: Run) -> GuardTimes:
    """Measure the guards of three models, then the steps of one model with and without the watch."""
    wide, pictures = small_llama(run.size), resnet(run.size)
    built = (
        ("Llama", wide, OURS, Settings()),
        ("ResNet", pictures, OURS, Settings(target_modules=("convolution",))),
        ("Llama, one graph", wide, EXPORTED, Settings()),
    )
    cases = tuple(
        _guards(title, workload, way, settings, run.part(index, len(built) + 1, title))
        for index, (title, workload, way, settings) in enumerate(built)
    )
    steps = _steps(wide, run.part(len(built), len(built) + 1, "watch"))
    return GuardTimes(cases, steps)


def _rows(results: GuardTimes) -> Iterator[list[str]]:
    for case in results.cases:
        yield [f"{case.title}: forward", "", "", str(case.forward), "", ""]
        portion = case.portion
        part = " to ".join(f"{100 * value:.3f}" for value in (portion.low, portion.high))
        shown = ["the forward", f"{100 * portion.median:.3f} % ({part})"]
        counts = [str(case.graphs), str(case.conditions)]
        yield [f"{case.title}: guards", *counts, str(case.guards), *shown]
    off = results.steps[OFF]
    for name, sample in results.steps.items():
        beside = ["", ""] if name == OFF else [OFF, str(ratio(sample, off))]
        yield [name, "", "", str(sample), *beside]


def _guards(title: str, workload: Workload, way: str, settings: Settings, run: Run) -> Case:
    placement = Placement(torch.device("cpu"), torch.float32)
    settings = dataclasses.replace(settings, example_inputs=workload.on(placement))
    model = BUILDERS[way](workload.make(), settings).train()
    forward = functools.partial(model, **workload.inputs)
    forward()  # the watched call
    called = list(called_graphs(forward))
    guards = [(module, guard_of(tests, names)) for module, tests, names in called if tests]

    def ask(_: Any) -> None:
        for _ in range(_PASSES):
            for module, guard in guards:
                guard(module)

    samples = run.times(
        {_FORWARD: (lambda: None, lambda _: forward()), _CONDITIONS: (lambda: None, ask)},
        seconds=_SECONDS,
        clock=time.thread_time,
    )
    single = Sample(tuple(taken / _PASSES for taken in samples[_CONDITIONS].times))
    conditions = sum(len(tests) for _, tests, _ in called)
    return Case(title, len(called), conditions, samples[_FORWARD], single)


def called_graphs(
    forward: Callable[[], Any],
) -> Iterator[tuple[nn.Module, list[str], dict[str, Any]]]:
    """Yield the graphs that a call of a model runs, each with the comparisons of its guard.

    Args:
        forward: Function that calls the model.

    Yields:
        The module, the comparisons as Python code that is true if the graph does not apply, and the
        globals of that code.
    """
    calls: list[tuple[nn.Module, FrameType]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_locals.get("self") if event == "call" else None
        if isinstance(module, nn.Module) and frame.f_code is getattr(type(module), CODE, None):
            calls.append((module, frame))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        forward()
    finally:
        sys.setprofile(before)
    for module, frame in calls:
        graph = getattr(type(module), GRAPH)
        tests = list(conditions_of(torch_private.codegen_of(graph).reads))
        yield module, tests, dict(frame.f_globals)


def guard_of(tests: list[str], names: dict[str, Any]) -> Callable[[nn.Module], bool]:
    """Return a function that makes only the comparisons of a guard, to time them alone.

    Args:
        tests: The comparisons.
        names: The globals of their code.
    """
    source = "def forward(self):\n    return (\n        " + "\n        or ".join(tests) + "\n    )"
    guard: Callable[[nn.Module], bool] = generated(source, names, "guard")
    return guard


def _steps(workload: Workload, run: Run) -> dict[str, Sample]:
    base = workload.make()

    def step(loss: Callable[[], torch.Tensor]) -> None:
        torch.autograd.backward(loss())

    def after(steps: int, *, watch: bool = True) -> Callable[[], torch.Tensor]:
        model = BUILDERS[OURS](base, Settings()).train()
        for module in () if watch else model.modules():
            disarm(module)
        loss = loss_of(model, workload.inputs)
        for _ in range(steps):
            step(loss)
        model.zero_grad()
        return loss

    prepared = {
        FIRST: functools.partial(after, 0),
        SECOND: functools.partial(after, 1),
        LATER: functools.partial(after, 4),
        OFF: functools.partial(after, 1, watch=False),
        AGAIN: functools.partial(after, 1, watch=False),
    }
    contenders = {name: (prepare, step) for name, prepare in prepared.items()}
    return run.times(contenders, seconds=_SECONDS, clock=time.thread_time)


SECTION = Section(
    "guards",
    ("what", "graphs", "conditions", "median (quartiles)", "of", "ratio to it (quartiles)"),
    _run,
    _rows,
)
