"""A training step of a mixture of experts, adapters on the experts, beside PEFT's ``target_parameters``.

The frozen step is the same model without adapters, with the gradient taken down to the embeddings: what is
compared is what adapters cost on top of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.tools.bench.measure import Sample, interleaved
from lora_fx.tools.bench.memory import Memory, measure_memory

__all__ = ["TITLE", "caption", "rows", "run"]

TITLE = "A training step with adapters on experts, rank 16"

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_TOKENS = (2, 256)
_TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def run(
    *, repeats: int = 10, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, tuple[Sample, Memory]]:
    """Times and memory by contender."""
    steps = {name: _step(model) for name, model in _models().items()}
    timed = interleaved(
        {name: (_nothing, step) for name, step in steps.items()},
        repeats=repeats,
        progress=progress,
    )
    return {name: (timed[name], measure_memory(step)) for name, step in steps.items()}


def rows(
    results: dict[str, tuple[Sample, Memory]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table: columns and cells."""
    columns = ("contender", "median (quartiles)", "of frozen's", "peak MiB", "largest tensor MiB")
    frozen = results["frozen"][0].median
    return columns, [
        (
            name,
            str(sample),
            f"{sample.median / frozen:.2f}",
            f"{memory.peak / 2**20:.1f}",
            f"{memory.largest / 2**20:.1f}",
        )
        for name, (sample, memory) in results.items()
    ]


def caption() -> str:
    """What was measured."""
    width, hidden, experts = (
        _SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    one = 2 * width * hidden * 4 / 2**20
    return (
        f"Mixtral shapes: {_SHAPE['num_hidden_layers']} layers, {experts} experts of width {width} and "
        f"{hidden}, {_TOKENS[0]} x {_TOKENS[1]} tokens, fp32, grouped products. gate_up of one expert is "
        f"{one:.1f} MiB, of all of them {one * experts:.1f} MiB. Peak: what a step allocates beyond the "
        "weights."
    )


def _models() -> dict[str, nn.Module]:
    import peft

    adapted = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=[], target_parameters=_TARGETS, lora_dropout=0.0
    )
    ours = LoraConfig(r=16, lora_alpha=16, target_modules=_TARGETS)
    return {
        "frozen": _mixtral().requires_grad_(False),
        "lora-fx": rewrite(_mixtral(), ours),
        "PEFT": peft.get_peft_model(_mixtral(), adapted),
    }


def _nothing() -> None:
    """What a step needs before it."""


def _step(model: nn.Module) -> Callable[..., None]:
    """Forward and backward, the embeddings' gradient included: the frozen model has no other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(0, _SHAPE["vocab_size"], _TOKENS)
    embedded = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]

    def step(_: None = None) -> None:
        model.zero_grad(set_to_none=True)
        given = embedded.clone().requires_grad_()
        output: Any = model(inputs_embeds=given, labels=ids)
        output.loss.backward()

    return step


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = MixtralForCausalLM(MixtralConfig(**_SHAPE))
    return model.train()
