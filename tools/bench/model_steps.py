"""Whole training steps of models that people adapt."""

from __future__ import annotations

import functools

import torch

from lora_fx.tools.bench.chart import Bar, Group, bars
from lora_fx.tools.bench.contenders import AGAIN, EXPORTED, FROZEN, OURS, PEFT
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places, portion
from lora_fx.tools.bench.steps import (
    COLUMNS,
    Measured,
    Workload,
    bert,
    cells,
    gpt2,
    llama,
    llama_block,
    llama_shape,
    measure,
    vit,
)

__all__ = ["TITLE", "caption", "charts", "rows", "run", "workloads"]

TITLE = "Training steps of whole models, all-linear, rank 16"

_NAMES = (AGAIN, OURS, EXPORTED, PEFT)
_SECONDS = 40.0


def workloads(size: Size) -> tuple[Workload, ...]:
    """The models: with one sequence each, so that a step stays under some 1.5 s on two cores."""
    if size is Size.TINY:
        wide = llama("Llama 1 × 16", llama_shape(16, 32, 1, 2, 32), 8)
    else:
        wide = llama("Llama 8 × 1024, 256 tokens", llama_shape(1024, 2816, 8, 16), 256)
    found = (llama_block(size), vit(size), bert(size), gpt2(size), wide)
    return found[:2] if size is Size.QUICK else found


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[tuple[str, str], Measured]:
    """Results by workload and by device and dtype."""
    models = workloads(size)
    found: dict[tuple[str, str], Measured] = {}
    for index, workload in enumerate(models):
        work = functools.partial(_measured, workload, size, repeats)
        # On the CPU the small Llama has bf16: with all models it would take minutes.
        where = [one for one in places(half=True) if one.dtype is torch.float32 or one.on_cuda]
        title = workload.title.partition(",")[0]
        done = at_each(where, work, portion(progress, index, len(models), title))
        found |= {(workload.title, name): measured for name, measured in done.items()}
    return found


def rows(
    results: dict[tuple[str, str], Measured],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    return ("model", "where", "F", *COLUMNS), [
        (title, where, f"{measured.floor:.3f}", *cells(measured, name))
        for (title, where), measured in results.items()
        for name in measured.steps
    ]


def caption() -> str:
    """What was measured."""
    return (
        "Random weights in the shapes of the published configurations, whose own dropout is left as it is; "
        "one sequence or picture, forward and backward, eager. The Llama's second width is 2816. The "
        "Llama block is one of 2048 and 5504, as in the middle of a model: its input wants a gradient in "
        "every contender. Columns, both ways in and what F and the frozen step leave out are those of the "
        "small Llama above; the forced gradient is about 1 % of these steps, 1/(8·layers) in an encoder."
    )


def _measured(
    workload: Workload, size: Size, repeats: int, place: Place, progress: Progress | None
) -> Measured:
    return measure(
        workload,
        _NAMES,
        dropouts=(0.05,) if size is Size.QUICK else (0.0, 0.05),
        place=place,
        repeats=repeats,
        seconds=_SECONDS,
        progress=progress,
    )


def charts(results: dict[tuple[str, str], Measured]) -> dict[str, str]:
    """Pictures by file name: O of each device and dtype."""
    found = {}
    for where in dict.fromkeys(where for _, where in results):
        groups = [
            Group(
                title,
                [
                    Bar(
                        name,
                        one.overhead(name).median,
                        "ours" if name.startswith(OURS) else "theirs",
                    )
                    for name in one.steps
                    if not name.startswith(FROZEN)
                ],
                one.floor,
            )
            for (title, place), one in results.items()
            if place == where
        ]
        found[f"model-steps-{where.replace(', ', '-')}.svg"] = bars(
            f"Training steps beside the frozen ones ({where})",
            "O, less is better; 1 is the frozen step, the lines are F",
            groups,
        )
    return found
