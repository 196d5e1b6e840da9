"""The models that the stacks are given: tiny, of transformers, with factors that are not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.zoo import seeded

__all__ = ["IDS", "adapted", "llama"]

IDS = torch.arange(24).view(2, 12)
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@seeded
def llama(**options: Any) -> LlamaForCausalLM:
    """A Llama of two layers, in eval mode."""
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **options})).eval()


def adapted(config: LoraConfig | None = None, base: nn.Module | None = None) -> Any:
    """It, or another base, with an adapter that changes its outputs."""
    config = config or LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    return randomize(lora_fx.rewrite(llama() if base is None else base, config))
