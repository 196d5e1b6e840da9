"""Small mixtures of experts of transformers, each with another form of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo import seeded

transformers = pytest.importorskip("transformers")

__all__ = ["IDS", "MODELS", "SIZES", "deepseek_v3", "drawn", "gpt_oss", "mixtral", "qwen3_moe"]

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def drawn(config: Any) -> nn.Module:
    """A causal model with random weights, none of them zero."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@seeded
def mixtral() -> nn.Module:
    return drawn(transformers.MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=16))


@seeded
def qwen3_moe() -> nn.Module:
    return drawn(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, intermediate_size=24, moe_intermediate_size=12, head_dim=8
        )
    )


@seeded
def gpt_oss() -> nn.Module:
    """Interleaved gate and up, stored [in, out], with biases."""
    kinds = ["sliding_attention", "full_attention"]
    return drawn(
        transformers.GptOssConfig(
            **SIZES, num_local_experts=4, intermediate_size=12, head_dim=8, layer_types=kinds
        )
    )


@seeded
def deepseek_v3() -> nn.Module:
    """Also shared experts, and a dense first layer."""
    return drawn(
        transformers.DeepseekV3Config(
            **SIZES,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            intermediate_size=24,
            moe_intermediate_size=12,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
}
IDS = torch.tensor([[5, 17, 3, 44, 9, 21, 30], [8, 2, 2, 51, 40, 7, 11]])
