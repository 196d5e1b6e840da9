"""A training step over an NF4 base, beside PEFT's over the same layers of bitsandbytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters import quantize
from lora_fx.formats import quantization_of
from lora_fx.tools.bench.contenders import (
    AGAIN,
    BUILDERS,
    CANONICAL,
    FROZEN,
    OURS,
    PEFT,
    Settings,
    model_floor,
    targets_of,
)
from lora_fx.tools.bench.counted import saved_by
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places
from lora_fx.tools.bench.steps import (
    COLUMNS,
    Measured,
    Workload,
    cells,
    compare,
    llama,
    llama_shape,
    loss_of,
    mebibytes,
    name_of,
)

__all__ = [
    "DENSE",
    "TITLE",
    "Found",
    "available",
    "caption",
    "quantized_base",
    "rows",
    "run",
    "workload",
]


def available() -> bool:
    """Whether bitsandbytes is there: it is not on every system that lora-fx runs on."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantized_base(model: nn.Module, scheme: str = "nf4") -> nn.Module:
    """A copy with every linear layer but the head in NF4: both libraries take it as their base.

    Args:
        model: Any model of ``nn.Linear``.
        scheme: A format of :func:`lora_fx.quantize`.
    """
    base: Any = quantize(model, scheme).train(model.training)
    # What transformers says of a model that it has quantised: PEFT asks for it.
    base.is_loaded_in_4bit = True
    result: nn.Module = base
    return result


TITLE = "A training step over an NF4 base, rank 16"

DENSE = "weights"
"""The kind of what has the shape of a weight and holds its values."""

_LAYERS, _WIDTH, _INNER, _TOKENS = 4, 512, 1376, 384
_DROPOUTS = (0.0, 0.05)
_SECONDS = 40.0


@dataclasses.dataclass(frozen=True)
class Found:
    """At one place.

    Attributes:
        measured: Times and memory.
        dense: Bytes of dequantised weights that each contender keeps for its backward.
        stored: Bytes of the quantised weights, with their scales.
        plain: Bytes of the same weights before.
    """

    measured: Measured
    dense: Mapping[str, int]
    stored: int
    plain: int


def workload(size: Size) -> Workload:
    """The model and its batch: no more tokens than any width, so that no input has a weight's shape."""
    if size is Size.TINY:
        return llama("Llama 1 × 64", llama_shape(64, 128, 1, 2, 32), 8)
    return llama(f"Llama {_LAYERS} × {_WIDTH}", llama_shape(_WIDTH, _INNER, _LAYERS, 8), _TOKENS)


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Found]:
    """Results by device and dtype; none without bitsandbytes."""
    given = workload(size)

    def work(place: Place, tell: Progress | None) -> Found:
        plain = given.make().to(place.device, place.dtype)
        inputs = given.on(place)
        floor = model_floor(
            plain, targets_of(plain, Settings()), Settings().r, lambda model: model(**inputs)
        )
        base = quantized_base(plain)
        models = _models(base, size)
        losses = {name: loss_of(model, inputs) for name, model in models.items()}
        measured = compare(
            models,
            losses,
            floor=floor,
            device=place.device,
            repeats=repeats,
            seconds=_SECONDS,
            progress=tell,
        )
        shapes = _shapes(base)

        def kind(tensor: Tensor) -> str:
            wide = tensor.is_floating_point() and tuple(tensor.shape[-2:]) in shapes
            return DENSE if wide else ""

        dense = {
            name: saved_by(model, losses[name], kind).get(DENSE, 0)
            for name, model in models.items()
        }
        return Found(measured, dense, *_sizes(base, plain))

    where = places(half=size is Size.FULL) if available() else ()
    return at_each(where, work, progress)


def rows(results: dict[str, Found]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = ("where", *COLUMNS, "of it weights, MiB", "base weights, MiB (before)")
    return columns, [
        (
            where,
            *cells(found.measured, name),
            mebibytes(found.dense[name]),
            f"{mebibytes(found.stored)} ({mebibytes(found.plain)})" if name == FROZEN else "",
        )
        for where, found in results.items()
        for name in found.measured.steps
    ]


def caption() -> str:
    """What was measured."""
    return f"""Llama shapes: {_LAYERS} layers of width {_WIDTH} and {_INNER}, {_TOKENS} tokens, random
weights, eager, forward and backward. The linear layers but the head are `Linear4bit` of bitsandbytes: NF4,
the scales quantised, too. All contenders run over the same weights. O is beside the frozen quantised step,
which makes the values of every weight twice; F is that of the model before it was quantised, so that the true
floor is lower. In bf16 both have fp32 adapters; PEFT casts x to fp32 for them and keeps that, here A and B
are cast.

Saved is what a step keeps between forward and backward: what saved-tensor hooks see, and what functions hold
as attributes, as those of bitsandbytes do. Of it weights: what has the shape of a weight and is no whole
number; there should be none. The kernel makes the values of a weight in memory of its own, which the peak
does not count in the forward."""


def _models(base: nn.Module, size: Size) -> dict[str, nn.Module]:
    models = {name: BUILDERS[name](base, Settings()) for name in (FROZEN, AGAIN)}
    names = (OURS, PEFT) if size is Size.QUICK else (OURS, CANONICAL, PEFT)
    for dropout in _DROPOUTS:
        settings = dataclasses.replace(Settings(), lora_dropout=dropout)
        models |= {name_of(name, dropout): BUILDERS[name](base, settings) for name in names}
    return {name: model.train() for name, model in models.items()}


def _shapes(base: nn.Module) -> set[tuple[int, ...]]:
    """Of the quantised weights, either way round."""
    found = [one.shape for p in base.parameters() if (one := quantization_of(p)) is not None]
    return {*found, *(shape[::-1] for shape in found)}


def _sizes(base: nn.Module, plain: nn.Module) -> tuple[int, int]:
    stored = dense = 0
    for name, parameter in base.named_parameters():
        if quantization_of(parameter) is not None:
            state = parameter.quant_state  # type: ignore[attr-defined]
            scales = (state.absmax, *((state.state2.absmax,) if state.nested else ()))
            stored += parameter.nbytes + sum(one.nbytes for one in scales)
            dense += plain.get_parameter(name).nbytes
    return stored, dense
