"""The same step of a small Llama under ``torch.compile``, time to compile not counted."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

import torch
from torch import nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import AGAIN, FROZEN, OURS, PEFT, THIRD
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, compiles, places, ratio
from lora_fx.tools.bench.steps import Measured, measure, name_of

__all__ = ["BASE", "TITLE", "caption", "rows", "run"]

TITLE = "The same step compiled, rank 16"

BASE = "frozen, compiled"
"""The frozen model under ``torch.compile``."""

_AGAIN = "frozen, compiled again (A/A)"
_TITLES = {AGAIN: BASE, THIRD: _AGAIN}
_NAMES = (AGAIN, THIRD, OURS, PEFT)
_SECONDS = 60.0


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Measured]:
    """Results by device; none where there is nothing to compile with."""
    workload = llama_step.workload(size if size is Size.FULL else Size.TINY)

    def work(place: Place, tell: Progress | None) -> Measured:
        # What earlier sections compiled would count towards the limit on compilations of one forward.
        torch.compiler.reset()
        found = measure(
            workload,
            _NAMES if size is Size.FULL else (AGAIN, OURS),
            dropouts=(0.0, 0.05) if size is Size.FULL else (0.0,),
            place=place,
            repeats=repeats,
            seconds=_SECONDS,
            progress=tell,
            wrap=_compiled,
        )
        torch.compiler.reset()
        steps = {_TITLES.get(name, name): step for name, step in found.steps.items()}
        return dataclasses.replace(found, steps=steps)

    where = [place for place in places(half=False) if compiles(place.device)]
    return at_each(where, work, progress, "compiled")


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
            name if name.startswith(FROZEN) else f"{name}, compiled",
            str(step.sample),
            f"{measured.overhead(name).median:.2f}",
            f"{ratio(step.sample, measured.steps[BASE].sample).median:.2f}",
        )
        for where, measured in results.items()
        for name, step in measured.steps.items()
    ]


def _compiled(model: nn.Module) -> nn.Module:
    # All contenders run the same code of transformers. Where its compilations are shared, one contender
    # pays for the guards of the others, and all of them count towards the limit. torch 2.9 cannot keep
    # them apart.
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: Any = {"isolate_recompiles": True} if isolates else {}
    return cast(nn.Module, torch.compile(model, **options))


def caption() -> str:
    """What was measured."""
    return (
        "`torch.compile(model)` with inductor, fp32. Dropout under inductor is a generator of its own, which "
        f"costs less on a CPU than PyTorch's. {name_of(OURS, 0)} is the default rewrite, compiled. "
        "The hook that wants a gradient of the embeddings breaks the frozen model's graph behind them. "
        "The section is empty where no C++ compiler (for CUDA: no Triton) is found."
    )
