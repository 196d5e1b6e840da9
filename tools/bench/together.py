"""How long a step takes that trains eight adapters by one batch, beside steps of one adapter."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import adapter_losses, add_adapter, set_adapter
from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.measure import Run, Sample, Size, ratio
from lora_fx.tools.bench.section import Section
from lora_fx.tools.bench.workloads import RANK, small_llama

__all__ = ["AGAIN", "ONE", "SECTION", "SEPARATE", "TOGETHER"]

_RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
_ROWS = len(_RANKS)
ONE = f"one adapter of rank {RANK}, {_ROWS} rows"
AGAIN = f"{ONE}, again (A/A)"
TOGETHER = f"{_ROWS} adapters, {_ROWS} rows"
_BRANCHES = f"{TOGETHER}, a branch for each"
SEPARATE = f"{_ROWS} steps of one row"
_SECONDS = 60.0


def _measured(run: Run) -> dict[str, dict[str, Sample]]:
    """Times by how many tokens a row has and which dropout there is."""
    cases = {"8 tokens": (8, 0.0), "16 tokens": (16, 0.0), "64 tokens": (64, 0.0)}
    cases["64 tokens, p = 0.05"] = (64, 0.05)
    if run.size is not Size.FULL:
        cases = {"8 tokens": (8, 0.0)}
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for (title, (tokens, dropout)), part in run.each(cases.items(), lambda one: one[0]):
            found[title] = part.times(
                _contenders(run.size, tokens, dropout), seconds=_SECONDS, clock=time.thread_time
            )
    finally:
        torch.set_num_threads(threads)
    return found


def _contenders(
    size: Size, tokens: int, dropout: float
) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    base = small_llama(size).make()
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (_ROWS, tokens), generator=torch.Generator().manual_seed(0))
    names = [f"adapter{place}" for place in range(_ROWS)]

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)

    def joint(optimize: bool) -> nn.Module:
        model = rewrite(base, config(_RANKS[0]), adapter_name=names[0], optimize=optimize)
        for name, rank in zip(names[1:], _RANKS[1:], strict=True):
            add_adapter(model, config(rank), name)
        set_adapter(model, names, per_sample=True)
        return model

    def together(model: nn.Module) -> None:
        logits = model(input_ids=ids, adapter_ids=names).logits
        torch.autograd.backward([*adapter_losses(logits, ids, names).values()])

    def separate(models: nn.Module) -> None:
        for row, model in enumerate(models.children()):
            _step(ids[row : row + 1], model)

    one = rewrite(base, config(RANK))
    alone = nn.ModuleList([rewrite(base, config(rank)) for rank in _RANKS])
    work: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
        ONE: (one, functools.partial(_step, ids)),
        AGAIN: (one, functools.partial(_step, ids)),
        TOGETHER: (joint(optimize=True), together),
        _BRANCHES: (joint(optimize=False), together),
        SEPARATE: (alone, separate),
    }
    return {name: (functools.partial(_reset, model), run) for name, (model, run) in work.items()}


def _step(ids: Tensor, model: nn.Module) -> None:
    torch.autograd.backward(model(input_ids=ids, labels=ids).loss)


def _reset(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return model


def _cells(results: Mapping[str, Mapping[str, Sample]]) -> Iterator[list[str]]:
    for title, samples in results.items():
        for name, sample in samples.items():
            beside = (ratio(sample, samples[other]) for other in (ONE, SEPARATE))
            yield [title, name, str(sample), *map(str, beside)]


SECTION = Section(
    "together_step",
    ("a row", "contender", "median (quartiles)", "of one adapter", f"of {_ROWS} steps"),
    _measured,
    _cells,
)
