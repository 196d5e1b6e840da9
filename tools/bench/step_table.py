"""Training steps as rows of a table."""

from __future__ import annotations

from lora_fx.tools.bench.contenders import FROZEN
from lora_fx.tools.bench.steps import Measured

__all__ = ["COLUMNS", "cells", "mebibytes"]

COLUMNS = (
    "contender",
    "median (quartiles)",
    "O (quartiles)",
    "η",
    "saved beyond frozen, MiB",
    "peak MiB",
    "ATen ops",
    "kernel launches",
    "allocator peak MiB",
)
"""Of the tables of steps; the last two are CUDA's."""


def cells(measured: Measured, name: str) -> tuple[str, ...]:
    """A row of :data:`COLUMNS`."""
    step, overhead = measured.steps[name], measured.overhead(name)
    plain = name.startswith(FROZEN)
    return (
        name,
        str(step.sample),
        "1" if name == FROZEN else str(overhead),
        "" if plain else _efficiency(measured.floor, overhead.median),
        mebibytes(measured.saved_beyond(name)),
        mebibytes(step.memory.peak if step.memory else None),
        _number(step.operations),
        _number(step.launches),
        mebibytes(step.allocated),
    )


def mebibytes(value: int | None) -> str:
    """A size as a table shows it, in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def _efficiency(floor: float | None, overhead: float) -> str:
    """η, F / O, as a table shows it."""
    return "–" if floor is None else f"{100 * floor / overhead:.0f} %"


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)
