"""A training step with weight-decomposed adapters beside one with plain ones, and beside PEFT's two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.measure import Sample, interleaved
from lora_fx.tools.bench.saved import saved_bytes

__all__ = ["TITLE", "caption", "forward_of", "models", "rows", "run"]

TITLE = "A training step with DoRA, rank 16"

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_TOKENS = (1, 512)
_DROPOUTS = (0.0, 0.05)

Result = tuple[Sample, int]


def run(
    *, repeats: int = 10, progress: Callable[[int, int, str], None] | None = None
) -> dict[float, dict[str, Result]]:
    """Times and bytes by dropout, then by contender."""
    return {dropout: _measured(dropout, repeats, progress) for dropout in _DROPOUTS}


def rows(results: dict[float, dict[str, Result]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells. Ratios are to plain adapters of the same library."""
    columns = ("dropout", "contender", "median (quartiles)", "of LoRA's", "saved MiB", "of LoRA's")
    table: list[tuple[str, ...]] = []
    for dropout, by_name in results.items():
        for name, (sample, saved) in by_name.items():
            plain, held = by_name[name.replace("DoRA", "LoRA")]
            table.append(
                (
                    f"{dropout:g}",
                    name,
                    str(sample),
                    f"{sample.median / plain.median:.2f}",
                    f"{saved / 2**20:.1f}",
                    f"{saved / held:.2f}",
                )
            )
    return columns, table


def caption() -> str:
    """What was measured."""
    return (
        f"Llama shapes: {_SHAPE['num_hidden_layers']} layers of width {_SHAPE['hidden_size']} and "
        f"{_SHAPE['intermediate_size']}, {_TOKENS[1]} tokens, all linear layers, fp32, eager. Saved: bytes "
        "that autograd keeps between forward and backward, each storage once, parameters left out. PEFT's "
        "DoRA takes a second base product under dropout; here the magnitude scales the product without."
    )


def _measured(
    dropout: float, repeats: int, progress: Callable[[int, int, str], None] | None
) -> dict[str, Result]:
    each = models(dropout)
    forwards = {name: forward_of(model) for name, model in each.items()}
    timed = interleaved(
        {name: (each[name].zero_grad, _step(forward)) for name, forward in forwards.items()},
        repeats=repeats,
        progress=progress,
    )
    return {
        name: (timed[name], saved_bytes(each[name], forward)) for name, forward in forwards.items()
    }


def models(dropout: float) -> dict[str, nn.Module]:
    """The contenders, of both libraries, by name."""
    import peft

    shared: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": dropout,
        "target_modules": "all-linear",
    }
    made: dict[str, nn.Module] = {}
    for kind, decomposed in (("LoRA", False), ("DoRA", True)):
        ours = LoraConfig(**shared, use_dora=decomposed)
        made[f"lora-fx {kind}"] = rewrite(_llama(), ours)
        theirs = peft.LoraConfig(**shared, use_dora=decomposed)
        made[f"PEFT {kind}"] = peft.get_peft_model(_llama(), theirs)
    return made


def forward_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A forward on the tokens of the benchmark, which gives the loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(0, _SHAPE["vocab_size"], _TOKENS)

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return forward


def _step(forward: Callable[[], torch.Tensor]) -> Callable[[Any], None]:
    def step(_: Any) -> None:
        torch.autograd.backward(forward())

    return step


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**_SHAPE))
    return model.train()
