"""A training step of a small Llama: every contender, both ways in, fp32 and bf16."""

from __future__ import annotations

import torch

from lora_fx.tools.bench.chart import Bar, Group, bars
from lora_fx.tools.bench.contenders import (
    AGAIN,
    CANONICAL,
    EXPORTED,
    FROZEN,
    OURS,
    PEERS,
    PEFT,
)
from lora_fx.tools.bench.measure import Place, Progress, Size, at_each, places
from lora_fx.tools.bench.steps import (
    COLUMNS,
    Measured,
    Workload,
    cells,
    llama,
    llama_shape,
    measure,
)

__all__ = ["TITLE", "caption", "charts", "rows", "run", "workload"]

TITLE = "A training step of a small Llama, all-linear, rank 16"

_LAYERS, _WIDTH, _INNER, _TOKENS = 4, 512, 1376, 512
_DROPOUTS = (0.0, 0.05)
_NAMES = (AGAIN, OURS, CANONICAL, EXPORTED, PEFT, *PEERS)
_FEW_NAMES = (AGAIN, OURS, CANONICAL, PEFT, PEERS[0])
_SECONDS = 90.0


def workload(size: Size) -> Workload:
    """The model and its batch."""
    if size is Size.TINY:
        return llama("Llama 1 × 16", llama_shape(16, 32, 1, 2, 32), 8)
    return llama(f"Llama {_LAYERS} × {_WIDTH}", llama_shape(_WIDTH, _INNER, _LAYERS, 8), _TOKENS)


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, Measured]:
    """Results by device and dtype."""

    def work(place: Place, tell: Progress | None) -> Measured:
        return measure(
            workload(size),
            _names(size, place.dtype),
            dropouts=_DROPOUTS,
            place=place,
            repeats=repeats,
            seconds=_SECONDS,
            progress=tell,
        )

    return at_each(places(half=size is Size.FULL), work, progress)


def rows(results: dict[str, Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    return ("where", *COLUMNS), [
        (where, *cells(measured, name))
        for where, measured in results.items()
        for name in measured.steps
    ]


def caption() -> str:
    """What was measured."""
    forced = 6 * _WIDTH**2 / (4 * _LAYERS * (4 * _WIDTH**2 + 3 * _WIDTH * _INNER))
    return f"""Llama shapes: {_LAYERS} layers of width {_WIDTH} and {_INNER}, {_TOKENS} tokens, random
weights, eager, forward and backward. PEFT keeps fp32 adapters beside bf16 weights, and so does lora-fx; those
that are written out here have the weights' dtype. `lora-fx` is the default, rewritten without inputs:
regions. With example inputs the whole model is one graph, where layers that read the same input can share it:
the difference between the two rows is what that adds. A/A is the frozen step under a second name: noise.

O is the time beside that of the frozen step, which takes the gradient down to the embeddings. An adapted
model stops at its first adapters: the inputs of the first q, k and v need no gradient, {100 * forced:.1f} %
of what the frozen step's linear layers compute. O of every contender is smaller by up to as much, and can be
below F.

F, the floor of O, is 1 + 6·Σ T·r·(d + k) / 4·Σ T·d·k over the linear layers, the head in the second sum only:
what the thin products of the branches cost if a FLOP costs the same everywhere. Attention's own products, the
norms and the loss are not in the second sum. The true floor is lower: F - 1 by the share of the frozen step
that they take in the profile below. η is F / O.

Saved is what autograd keeps between forward and backward. In fp32 the 18.6 MiB are inputs that only
gradients of A need, each kept once (17.7: those of down_proj, 2.7 a layer, and what norms give, 1.0 each;
that of o_proj is attention's output), and x Aᵀ (0.9). To compute x Aᵀ again is a seventh thin product beside
six and raises F by 0.011, so it is kept. With example inputs transformers gives attention a mask that it
leaves out otherwise: {_TOKENS} × {_TOKENS} numbers, once for all layers, are 1.0 MiB more. Peak is what is
held at once beyond what was there before, counted tensor by tensor; the allocator's peak, on CUDA, has its
rounding and what kernels take for themselves in it, too."""


def charts(results: dict[str, Measured]) -> dict[str, str]:
    """Pictures by file name: O and bytes saved."""
    found = {}
    for where, measured in results.items():
        names = [name for name in measured.steps if name != FROZEN]
        slug = where.replace(", ", "-")
        times = [Bar(name, measured.overhead(name).median, _kind(name)) for name in names]
        found[f"llama-step-{slug}.svg"] = bars(
            f"Step of a small Llama beside the frozen one ({where})",
            "O, less is better; 1 is the frozen step, the line F",
            [Group("", times, measured.floor)],
        )
        saved = [
            Bar(name, beyond / 2**20, _kind(name))
            for name in names
            if not name.startswith(FROZEN) and (beyond := measured.saved_beyond(name)) is not None
        ]
        found[f"llama-saved-{slug}.svg"] = bars(
            f"Saved for backward beyond the frozen step ({where})",
            "MiB, less is better",
            [Group("", saved)],
        )
    return found


def _names(size: Size, dtype: torch.dtype) -> tuple[str, ...]:
    if size is Size.QUICK:
        return (AGAIN, OURS, EXPORTED, PEFT)
    return _NAMES if dtype is torch.float32 else _FEW_NAMES


def _kind(name: str) -> str:
    if name.startswith(OURS):
        return "ours"
    return "base" if name.startswith(FROZEN) else "theirs"
