"""A training step with weight-decomposed adapters beside one with plain ones, and beside PEFT's two."""

from __future__ import annotations

import dataclasses

from torch import nn

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import AGAIN, BUILDERS, FROZEN, OURS, PEFT, Settings
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places, ratio
from lora_fx.tools.bench.steps import COLUMNS, Measured, cells, compare, loss_of, mebibytes, name_of

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

    def work(place: Place, tell: Progress | None) -> Measured:
        models = _models(workload.make().to(place.device, place.dtype))
        inputs = workload.on(place)
        return compare(
            models,
            {name: loss_of(model, inputs) for name, model in models.items()},
            floor=None,
            device=place.device,
            repeats=repeats,
            seconds=_SECONDS,
            progress=tell,
        )

    return at_each(places(half=size is Size.FULL), work, progress)


def rows(results: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells. The last two ratios are to plain adapters of the same library."""
    columns = ("where", *COLUMNS, "saved MiB", "time of LoRA's", "saved of LoRA's")
    table = []
    for where, measured in results.items():
        for name, step in measured.steps.items():
            time = saved = ""
            if DORA in name:
                plain = measured.steps[name.replace(DORA, LORA)]
                time = f"{ratio(step.sample, plain.sample).median:.2f}"
                saved = f"{step.saved / plain.saved:.2f}" if step.saved and plain.saved else "–"
            table.append((where, *cells(measured, name), mebibytes(step.saved), time, saved))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "The small Llama above, eager. Saved: bytes that autograd keeps between forward and backward, "
        "each storage once, parameters left out. PEFT's DoRA takes a second base product under dropout; here "
        "the magnitude scales the product without. The last two columns are beside plain LoRA of the "
        "same library. What DoRA must do beyond LoRA is the norm of W + s·BA, a pass over every weight "
        "(WAᵀ, another thin product, of the weight in the place of x), one over every output, and for "
        "square layers the base product once more in the backward."
    )


def _models(base: nn.Module) -> dict[str, nn.Module]:
    """The contenders of both libraries, by name, over the weights of one base."""
    models = {name: BUILDERS[name](base, Settings()) for name in (FROZEN, AGAIN)}
    for dropout in _DROPOUTS:
        for library in (OURS, PEFT):
            for kind in (LORA, DORA):
                settings = dataclasses.replace(
                    Settings(), lora_dropout=dropout, use_dora=kind == DORA
                )
                models[name_of(f"{library} {kind}", dropout)] = BUILDERS[library](base, settings)
    return {name: model.train() for name, model in models.items()}
