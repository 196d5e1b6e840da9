"""The same step of a small Llama under ``torch.compile``, time to compile not counted."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import AGAIN, FROZEN, OURS, PEERS, PEFT
from lora_fx.tools.bench.hardware import compiles, devices
from lora_fx.tools.bench.measure import Progress, portion, ratio
from lora_fx.tools.bench.sizes import Size
from lora_fx.tools.bench.steps import Measured, case, measure, name_of

__all__ = ["BASE", "TITLE", "caption", "rows", "run"]

TITLE = "The same step compiled, rank 16"

BASE = "frozen, compiled"
"""The frozen model under ``torch.compile``."""

_NAMES = (AGAIN, OURS, PEFT, PEERS[0])
_SECONDS = 60.0


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Measured]:
    """Results by device; none where there is nothing to compile with."""
    places = [device for device in devices() if compiles(device)]
    results = {}
    for index, device in enumerate(places):
        # What earlier sections compiled would count towards the limit on compilations of one forward.
        torch.compiler.reset()
        found = measure(
            llama_step.workload(size),
            _NAMES if size is Size.FULL else (AGAIN, OURS),
            dropouts=(0.0, 0.05) if size is Size.FULL else (0.0,),
            device=device,
            dtype=torch.float32,
            repeats=repeats,
            seconds=_SECONDS,
            progress=portion(progress, index, len(places), "compiled"),
            wrap=_compiled,
        )
        torch.compiler.reset()
        steps = {BASE if name == AGAIN else name: step for name, step in found.steps.items()}
        results[case(device, torch.float32)] = dataclasses.replace(found, steps=steps)
    return results


def rows(results: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = (
        "where",
        "contender",
        "median (quartiles)",
        "of frozen, eager",
        "of frozen, compiled",
    )
    return columns, [
        (
            where,
            name if name in (FROZEN, BASE) else f"{name}, compiled",
            str(step.sample),
            f"{measured.overhead(name).median:.2f}",
            f"{ratio(step.sample, measured.steps[BASE].sample).median:.2f}",
        )
        for where, measured in results.items()
        for name, step in measured.steps.items()
    ]


def _compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model))


def caption() -> str:
    """What was measured."""
    return (
        "`torch.compile(model)` with inductor, fp32. Dropout under inductor is a generator of its own, which "
        f"costs less on a CPU than PyTorch's. {name_of(OURS, 0)} is the default rewrite, compiled. "
        "The section is empty where no C++ compiler (for CUDA: no Triton) is found."
    )
