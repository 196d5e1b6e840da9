"""Whole training steps of models that people adapt."""

from __future__ import annotations

import torch

from lora_fx.tools.bench.chart import Bar, Group, bars
from lora_fx.tools.bench.contenders import AGAIN, FROZEN, OURS, PEERS, PEFT
from lora_fx.tools.bench.hardware import computes_bf16, devices
from lora_fx.tools.bench.measure import Progress, portion
from lora_fx.tools.bench.sizes import Size
from lora_fx.tools.bench.steps import COLUMNS, Measured, case, cells, measure
from lora_fx.tools.bench.workloads import Workload, bert, gpt2, llama, llama_shape, vit

__all__ = ["TITLE", "caption", "charts", "rows", "run", "workloads"]

TITLE = "Training steps of whole models, all-linear, rank 16"

_NAMES = (AGAIN, OURS, PEFT, PEERS[0])
_SECONDS = 60.0


def workloads(size: Size) -> tuple[Workload, ...]:
    """The models: with one sequence each, so that a step stays under some 1.5 s on two cores."""
    if size is Size.TINY:
        wide = llama("Llama 1 × 16", llama_shape(16, 32, 1, 2, 32), 8)
    else:
        wide = llama("Llama 8 × 1024, 256 tokens", llama_shape(1024, 2816, 8, 16), 256)
    found = (vit(size), bert(size), gpt2(size), wide)
    return found[:1] if size is Size.QUICK else found


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[tuple[str, str], Measured]:
    """Results by workload and by device and dtype."""
    cases = [
        (workload, device, dtype)
        for workload in workloads(size)
        for device in devices()
        for dtype in (torch.float32, torch.bfloat16)
        # On the CPU the small Llama has bf16: with four models it would take minutes.
        if dtype is torch.float32 or (device.type == "cuda" and computes_bf16(device))
    ]
    return {
        (workload.title, case(device, dtype)): measure(
            workload,
            _NAMES,
            dropouts=(0.0, 0.05),
            device=device,
            dtype=dtype,
            repeats=repeats,
            seconds=_SECONDS,
            progress=portion(progress, index, len(cases), workload.title.partition(",")[0]),
        )
        for index, (workload, device, dtype) in enumerate(cases)
    }


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
        "one sequence or picture, forward and backward, eager. The Llama's second width is 2816. "
        "Columns are those of the small Llama above."
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
