"""What a step keeps for its backward, by kind: what bounds the memory that is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_fx.tools.bench import llama_step
from lora_fx.tools.bench.contenders import FROZEN, Settings
from lora_fx.tools.bench.counted import saved_by
from lora_fx.tools.bench.measure import Place, Progress, Size
from lora_fx.tools.bench.profile_step import contenders, is_thin
from lora_fx.tools.bench.steps import loss_of, mebibytes

__all__ = ["KINDS", "TITLE", "caption", "kind_of", "rows", "run"]

TITLE = "What that step keeps for its backward"

WIDE = "T × width"
THIN = "T × r, r × width"
MASKS = "bits and whole numbers"
OTHER = "vectors, T × 1"
KINDS = (WIDE, THIN, MASKS, OTHER)
"""In the order of the table."""


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Mapping[str, int]]:
    """Bytes by contender, then by kind. Nothing is timed, and a CPU keeps what a GPU does."""
    workload, place = llama_step.workload(size), Place(torch.device("cpu"), torch.float32)
    base = workload.make()
    inputs = workload.on(place)
    models = contenders(base, dataclasses.replace(Settings(), example_inputs=inputs), both=True)
    found: dict[str, Mapping[str, int]] = {}
    for done, (name, model) in enumerate(models.items(), 1):
        found[name] = saved_by(model, loss_of(model, inputs), kind_of)
        if progress is not None:
            progress(done, len(models), name)
    return found


def rows(results: dict[str, Mapping[str, int]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: MiB of each kind beyond the frozen step; in its own row, all of it."""
    columns = ("contender", *(f"{kind}, MiB" for kind in KINDS), "sum, MiB")
    table = []
    for name, found in results.items():
        base: Mapping[str, int] = {} if name == FROZEN else results[FROZEN]
        sizes = [found.get(kind, 0) - base.get(kind, 0) for kind in KINDS]
        table.append((name, *(f"{size / 2**20:z.2f}" for size in sizes), mebibytes(sum(sizes))))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "fp32, by the shape and type of what is kept; each storage once, parameters left out. The first "
        "row is all that the frozen step keeps, the others are what comes to it. T × width: the inputs of "
        "linear layers, for the gradient of A (a frozen layer needs none), and whatever has their size: "
        "masks of PyTorch's dropout and what they have dropped. T × r: xAᵀ, for the gradient of B. "
        "Bits and whole numbers: masks of lora-fx. An input that is kept for another reason, as by an "
        "activation, costs nothing. With example inputs "
        "the graph has the causal mask written out, T × T in each layer, which attention keeps; without "
        "them its kernel knows the mask. What is below the sum of the inputs would have to be computed again."
    )


def kind_of(tensor: Tensor) -> str:
    """The kind of something that is kept, at the rank of the benchmark."""
    if not tensor.is_floating_point():
        return MASKS
    if is_thin(tensor.shape, Settings().r):
        return THIN
    return OTHER if sum(length > 1 for length in tensor.shape) < 2 else WIDE
