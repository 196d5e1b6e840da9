"""How long it takes to put adapters on a model: Llama shapes on the meta device, beside PEFT.

PEFT changes the model that it is given, so that it gets a new one each time; that is not timed. The
A/A row runs the same rewrite under a second name: what differs there is noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.contenders import EXPORTED, OURS, PEFT
from lora_fx.tools.bench.measure import Progress, Sample, Size, interleaved, portion

__all__ = ["TITLE", "caption", "rows", "run"]

TITLE = "Rewriting Llama-7B on the meta device, rank 16"

_SECONDS = 20.0
_TOKENS = 64
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_AGAIN = f"{OURS} again (A/A)"


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is rewritten: the layers of the model, the targets, and by which ways in."""

    layers: int
    targets: str | list[str]
    exported: bool = False


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, Sample]]:
    """Times by target set, then by contender."""
    cases = _cases(size)
    return {
        title: interleaved(
            _contenders(one),
            repeats=repeats,
            seconds=_SECONDS,
            progress=portion(progress, index, len(cases), title),
        )
        for index, (title, one) in enumerate(cases.items())
    }


def _cases(size: Size) -> dict[str, _Case]:
    layers, few = (1, 1) if size is Size.TINY else (32, 4)
    return {
        "q, k, v, o": _Case(layers, _ATTENTION),
        "all-linear": _Case(layers, "all-linear"),
        f"all-linear, {few} layers": _Case(few, "all-linear", exported=True),
    }


def rows(results: dict[str, dict[str, Sample]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = ("targets", "contender", "median (quartiles)", "of PEFT's")
    table: list[tuple[str, ...]] = []
    for title, samples in results.items():
        peft = samples[PEFT].median
        for name, sample in samples.items():
            table.append((title, name, str(sample), f"{sample.median / peft:.2f}"))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "Llama-7B shapes without values. PEFT changes the model that it is given and gets a new one each "
        "time, which is not timed. A/A is the same rewrite under a second name: what differs there is noise. "
        f"With example inputs ({_TOKENS} tokens) `torch.export` runs the model once, which is nearly all of "
        "that time: it is measured on a few layers."
    )


def _contenders(one: _Case) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    import peft

    base = _llama(one.layers)
    fields: Any = {"r": 16, "lora_alpha": 16, "target_modules": one.targets}
    ours = LoraConfig(**fields)

    # A configuration of its own for each run: PEFT writes into the one that it is given.
    def fresh() -> tuple[nn.Module, Any]:
        return _llama(one.layers), peft.LoraConfig(**fields)

    def rewrite_base(_: None) -> nn.Module:
        return rewrite(base, ours)

    def wrap(given: tuple[nn.Module, Any]) -> Any:
        return peft.get_peft_model(*given)

    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}

    def export_base(_: None) -> nn.Module:
        return rewrite(base, ours, inputs, frontend="export")

    found: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        OURS: (_nothing, rewrite_base),
        _AGAIN: (_nothing, rewrite_base),
        PEFT: (fresh, wrap),
    }
    return found | {EXPORTED: (_nothing, export_base)} if one.exported else found


def _nothing() -> None:
    """Ours needs no fresh model: the one that it is given stays as it is."""


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    return model
