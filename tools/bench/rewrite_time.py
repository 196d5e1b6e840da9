"""How long it takes to put adapters on a model: Llama shapes on the meta device, beside PEFT.

PEFT changes the model that it is given, so that it gets a new one each time; that is not timed. The
A/A row runs the same rewrite under a second name: what differs there is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.measure import Progress, Sample, interleaved, portion
from lora_fx.tools.bench.sizes import Size

__all__ = ["TITLE", "caption", "rows", "run"]

TITLE = "Rewriting Llama-7B on the meta device, rank 16"

_TARGETS = {"q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear"}


def run(
    *, repeats: int = 10, size: Size = Size.FULL, progress: Progress | None = None
) -> dict[str, dict[str, Sample]]:
    """Times by target set, then by contender."""
    return {
        title: interleaved(
            _contenders(targets, size),
            repeats=repeats,
            progress=portion(progress, index, len(_TARGETS), title),
        )
        for index, (title, targets) in enumerate(_TARGETS.items())
    }


def rows(results: dict[str, dict[str, Sample]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = ("targets", "contender", "median (quartiles)", "of PEFT's")
    table: list[tuple[str, ...]] = []
    for title, samples in results.items():
        peft = samples["PEFT"].median
        for name, sample in samples.items():
            table.append((title, name, str(sample), f"{sample.median / peft:.2f}"))
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        "Llama-7B shapes without values. PEFT changes the model that it is given and gets a new one each "
        "time, which is not timed. A/A is the same rewrite under a second name: what differs there is noise."
    )


def _contenders(
    targets: Any, size: Size
) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    import peft

    layers = 1 if size is Size.TINY else 32
    base = _llama(layers)
    ours = LoraConfig(r=16, lora_alpha=16, target_modules=targets)

    # A configuration of its own for each run: PEFT writes into the one that it is given.
    def fresh() -> tuple[nn.Module, Any]:
        return _llama(layers), peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets)

    def rewrite_base(_: None) -> nn.Module:
        return rewrite(base, ours)

    def wrap(given: tuple[nn.Module, Any]) -> Any:
        return peft.get_peft_model(*given)

    return {
        "lora-fx": (lambda: None, rewrite_base),
        "lora-fx again (A/A)": (lambda: None, rewrite_base),
        "PEFT": (fresh, wrap),
    }


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    return model
