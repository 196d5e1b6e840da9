"""A training step with weight-decomposed adapters beside one with plain ones, and beside PEFT's two."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import BUILDERS, FROZEN, OURS, PEFT, Settings
from lora_fx.tools.bench.hardware import devices
from lora_fx.tools.bench.measure import Progress, portion, ratio
from lora_fx.tools.bench.sizes import Size
from lora_fx.tools.bench.steps import (
    COLUMNS,
    Measured,
    case,
    cells,
    compare,
    loss_of,
    mebibytes,
    name_of,
)

__all__ = ["DORA", "LORA", "TITLE", "caption", "rows", "run"]

TITLE = "A training step with DoRA, rank 16"

LORA, DORA = "LoRA", "DoRA"

_DROPOUTS = (0.0, 0.05)
_SECONDS = 60.0


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Measured]:
    """Results by device and dtype; contenders are called "lora-fx DoRA, p = 0" and the like."""
    workload = llama_step.workload(size)
    results = {}
    for index, device in enumerate(devices()):
        base = workload.make().to(device)
        inputs = workload.on(device, torch.float32)
        models = _models(base)
        results[case(device, torch.float32)] = compare(
            models,
            {name: loss_of(model, inputs) for name, model in models.items()},
            floor=None,
            device=device,
            repeats=repeats,
            seconds=_SECONDS,
            progress=portion(progress, index, len(devices())),
        )
    return results


def rows(results: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells. The last two ratios are to plain adapters of the same library."""
    columns = ("where", *COLUMNS, "saved MiB", "time of LoRA's", "saved of LoRA's")
    table = []
    for where, measured in results.items():
        for name, step in measured.steps.items():
            plain = measured.steps[name.replace(DORA, LORA)]
            saved = f"{step.saved / plain.saved:.2f}" if step.saved and plain.saved else "–"
            time = f"{ratio(step.sample, plain.sample).median:.2f}"
            more = (mebibytes(step.saved), time, saved)
            table.append((where, *cells(measured, name), *more))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "The small Llama above, fp32, eager. Saved: bytes that autograd keeps between forward and backward, "
        "each storage once, parameters left out. PEFT's DoRA takes a second base product under dropout; here "
        "the magnitude scales the product without."
    )


def _models(base: nn.Module) -> dict[str, nn.Module]:
    """The contenders of both libraries, by name, over the weights of one base."""
    models = {FROZEN: BUILDERS[FROZEN](base, Settings())}
    for dropout in _DROPOUTS:
        for library in (OURS, PEFT):
            for kind in (LORA, DORA):
                settings = dataclasses.replace(
                    Settings(), lora_dropout=dropout, use_dora=kind == DORA
                )
                models[name_of(f"{library} {kind}", dropout)] = BUILDERS[library](base, settings)
    return {name: model.train() for name, model in models.items()}
