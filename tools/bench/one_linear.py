"""One linear layer, forward and backward, as inside a model: x requires a gradient."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.runtime.kernels import masks
from lora_fx.tools.bench import contenders
from lora_fx.tools.bench.counted import saved_bytes
from lora_fx.tools.bench.measure import (
    Placement,
    Run,
    Sample,
    Size,
    kernel_launches,
    placements,
    ratio,
)
from lora_fx.tools.bench.section import Chart, Group, Section

__all__ = ["KERNEL_SECTION", "SECTION", "Cell"]

_CORE = (contenders.OURS, contenders.PEFT)
_ALL = (contenders.OURS, contenders.CANONICAL, contenders.PEFT, *contenders.PEERS)
_RANK = 16
_HALF_WIDTH = 2048
"""The width that a CPU also measures in bf16."""

_DROPOUTS = (0.0, 0.05)
_SECONDS = 40.0
_SMALLEST_RUN = 3e9
"""Least FLOPs of one timed run: some 20 ms on two cores."""


class Shape(NamedTuple):
    """Shape whose contenders are measured together.

    Attributes:
        where: Device and dtype.
        d: Number of inputs and of outputs.
        tokens: Number of rows of the input: T in the table.
    """

    where: str
    d: int
    tokens: int


class Cell(NamedTuple):
    """Key of a contender's result: its name, its rank and its dropout probability.

    The last two are 0 for the frozen layer.
    """

    name: str
    rank: int = 0
    dropout: float = 0.0


Results = dict[Shape, dict[Cell, tuple[Sample, int | None]]]


def _run(run: Run) -> Results:
    """Measure times of a linear layer and, on CUDA, kernel launches, by shape and contender."""
    cases = [
        (placement, d, tokens)
        for placement in placements(half=run.size is Size.FULL)
        for d, tokens in itertools.product(*_grid(run.size))
        if placement.dtype is torch.float32 or placement.on_cuda or d == _HALF_WIDTH
    ]
    return {
        Shape(str(placement), d, tokens): _measured(placement, d, tokens, part)
        for (placement, d, tokens), part in run.each(
            cases, lambda case: f"d={case[1]}, T={case[2]}"
        )
    }


def _rows(results: Results) -> Iterator[list[str]]:
    """Yield a row of the table for each shape, rank and dropout: O and η of every contender."""
    for shape, cells in results.items():
        frozen = cells[Cell(contenders.FROZEN)][0]
        again = ratio(cells[Cell(contenders.AGAIN)][0], frozen)
        for rank, dropout in dict.fromkeys(
            (cell.rank, cell.dropout) for cell in cells if cell.rank
        ):
            floor = contenders.linear_floor(shape.d, shape.d, rank)
            row = [shape.where, str(shape.d), str(shape.tokens), str(rank), f"{dropout:g}"]
            row += [f"{1e3 * frozen.median:.3g} ms", f"{again.median:.2f}", f"{floor:.3f}"]
            yield [*row, *(_text(cells, Cell(n, rank, dropout), frozen, floor) for n in _ALL)]


def _charts(results: Results) -> dict[str, Chart]:
    """Return a chart of the overheads O at rank 16, for each device and dtype."""
    charts: dict[str, Chart] = {}
    for where in dict.fromkeys(shape.where for shape in results):
        groups = [
            Group(
                f"d = {shape.d}, T = {shape.tokens}, p = {dropout:g}",
                {
                    name: ratio(cells[cell][0], cells[Cell(contenders.FROZEN)][0]).median
                    for name in _CORE
                    if (cell := Cell(name, _RANK, dropout)) in cells
                },
                contenders.linear_floor(shape.d, shape.d, _RANK),
            )
            for shape, cells in results.items()
            if shape.where == where
            for dropout in _DROPOUTS
        ]
        charts[f"one-linear-{where.replace(', ', '-')}.svg"] = (
            f"One linear operation beside the frozen one, r = {_RANK} ({where})",
            "O, less is better; 1 is the frozen step, the lines are F",
            groups,
        )
    return charts


def _grid(size: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if size is Size.TINY:
        return (32,), (8,)
    return ((768,), (128,)) if size is Size.QUICK else ((768, 2048, 4096), (128, 2048))


def _cells(size: Size, d: int, tokens: int, placement: Placement) -> list[Cell]:
    small = placement.on_cuda or d * d * tokens < 4096 * 4096 * 2048
    cells = [Cell(contenders.FROZEN), Cell(contenders.AGAIN)]
    for rank in (8, 16, 64) if size is Size.FULL else (16,):
        for dropout in _DROPOUTS:
            names = _ALL if rank == _RANK and small else _CORE
            cells += [
                Cell(n, rank, dropout)
                for n in names
                if not (dropout and n in contenders.NO_DROPOUT)
            ]
    return cells


def _measured(
    placement: Placement, d: int, tokens: int, run: Run
) -> dict[Cell, tuple[Sample, int | None]]:
    cells, device = _cells(run.size, d, tokens, placement), placement.device
    base, x, grad = _operation(placement, d, tokens)
    steps = {}
    for cell in cells:
        settings = contenders.Settings(cell.rank or 1, cell.rank or 1, cell.dropout, ("0",))
        steps[cell] = _step(contenders.BUILDERS[cell.name](base, settings).train(), x, grad)
    titles = {f"{cell.name} r={cell.rank} p={cell.dropout:g}": cell for cell in cells}
    timed = run.times(
        {title: (lambda: None, steps[cell]) for title, cell in titles.items()},
        device,
        calls=_calls(d, tokens),
        seconds=_SECONDS,
    )
    return {
        cell: (timed[title], kernel_launches(lambda cell=cell: steps[cell](None), device))  # type: ignore[misc]
        for title, cell in titles.items()
    }


def _operation(placement: Placement, d: int, tokens: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the layer, its input and the gradient of its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(d, d, bias=False)).to(placement.device, placement.dtype)
        x = torch.randn(tokens, d).to(placement.device, placement.dtype).requires_grad_()
        return base, x, torch.randn(tokens, d).to(placement.device, placement.dtype)


def _calls(d: int, tokens: int) -> int:
    """Return the number of steps in one timed run of a layer of this size."""
    return max(1, round(_SMALLEST_RUN / (4 * tokens * d * d))) if d >= 512 else 2


def _step(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[Any], None]:
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step(_: Any) -> None:
        # grad returns gradients and accumulates none, so there is nothing to add to or to set to zero.
        torch.autograd.grad(model(x), leaves, grad)

    return step


def _text(
    cells: Mapping[Cell, tuple[Sample, int | None]], cell: Cell, frozen: Sample, floor: float
) -> str:
    if cell not in cells:
        return "–"
    sample, launches = cells[cell]
    overhead = ratio(sample, frozen).median
    text = f"{overhead:.2f} ({100 * floor / overhead:.0f} %)"
    return text if launches is None else f"{text}, {launches}"


SECTION = Section(
    "one_linear", ("where", "d", "T", "r", "p", "frozen", "A/A", "F", *_ALL), _run, _rows, _charts
)


# --- dropout by kernels -------------------------------------------------------------------------------
# The effect of Triton's kernels, on CUDA only.

_WITHOUT = f"{contenders.OURS}, without kernels"
_KERNEL_RANKS = (8, 16, 64, 256)
_DROPOUT = _DROPOUTS[1]

Kernels = dict[tuple[Shape, int], dict[str, tuple[Sample, int]]]


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """Compute masks and products by PyTorch's operations, as on systems without Triton."""
    before, masks.KERNEL_DEVICES = masks.KERNEL_DEVICES, ()
    try:
        yield
    finally:
        masks.KERNEL_DEVICES = before


def _run_kernels(run: Run) -> Kernels:
    """Measure times and saved bytes with and without lora-fx's kernels, by shape and rank, then by contender.

    Return no result without CUDA.
    """
    cases = [
        (placement, *sizes)
        for placement in placements(half=True)
        if placement.on_cuda and masks.has_kernels(placement.device)
        for sizes in itertools.product(*_grid(run.size), _KERNEL_RANKS)
    ]
    if not cases:
        run.tell(1, 1, "no CUDA")
    return {
        (Shape(str(placement), d, tokens), rank): _with_and_without(
            placement, d, tokens, rank, part
        )
        for (placement, d, tokens, rank), part in run.each(
            cases, lambda case: f"d={case[1]}, r={case[3]}"
        )
    }


def _with_and_without(
    placement: Placement, d: int, tokens: int, rank: int, run: Run
) -> dict[str, tuple[Sample, int]]:
    base, x, grad = _operation(placement, d, tokens)
    settings = contenders.Settings(rank, rank, _DROPOUT, ("0",))
    names = (contenders.FROZEN, contenders.AGAIN, contenders.OURS, contenders.PEFT)
    models = {name: contenders.BUILDERS[name](base, settings).train() for name in names}
    models[_WITHOUT] = models[contenders.OURS]
    work: dict[str, Callable[[Any], Any]] = {
        name: _step(model, x, grad) for name, model in models.items()
    }
    around = dict.fromkeys(names, contextlib.nullcontext) | {_WITHOUT: _without_kernels}

    def step(name: str) -> Callable[[Any], None]:
        def run_it(inputs: Any) -> None:
            with around[name]():
                work[name](inputs)

        return run_it

    results: dict[str, tuple[Sample, int]] = {}
    timed = run.times(
        {name: (lambda: None, step(name)) for name in work},
        placement.device,
        calls=_calls(d, tokens),
        seconds=_SECONDS,
    )
    for name, model in models.items():
        with around[name]():
            results[name] = timed[name], saved_bytes(model, lambda model=model: model(x))  # type: ignore[misc]
    return results


def _kernel_rows(results: Kernels) -> Iterator[list[str]]:
    """Yield rows of the table with the overhead O and the saved MiB of every contender."""
    for (shape, rank), contender_results in results.items():
        frozen = contender_results[contenders.FROZEN][0]
        row = [shape.where, str(shape.d), str(shape.tokens), str(rank)]
        row += [
            f"{1e3 * frozen.median:.3g} ms",
            str(ratio(contender_results[contenders.AGAIN][0], frozen)),
        ]
        for name in (contenders.OURS, _WITHOUT, contenders.PEFT):
            sample, kept = contender_results[name]
            row.append(f"{ratio(sample, frozen)}, {kept / 2**20:.2f}")
        yield row


KERNEL_SECTION = Section(
    "dropout_kernels",
    ("where", "d", "T", "r", "frozen", "A/A", contenders.OURS, _WITHOUT, contenders.PEFT),
    _run_kernels,
    _kernel_rows,
)
