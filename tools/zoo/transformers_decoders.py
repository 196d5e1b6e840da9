"""Decoders of transformers, without and with experts."""

from __future__ import annotations

from typing import Any

from lora_fx.tools.zoo.entries import Entry
from lora_fx.tools.zoo.transformers_common import TEXT, member, text

__all__ = ["ENTRIES"]

_DENSE = "transformers: decoders"
_EXPERTS = "transformers: mixtures of experts"

# Two query heads share one of keys and values.
_GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 4}
_FULL: dict[str, Any] = {**TEXT, "num_key_value_heads": 4}
# Multi-head latent attention.
_LATENT: dict[str, Any] = {
    **_FULL,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_LOW: dict[str, Any] = {"n_group": 1, "topk_group": 1}

_DECODERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Llama", "Llama", _GROUPED),
    ("Qwen2", "Qwen2", _GROUPED),
    ("Qwen3", "Qwen3", _HEADS),
    ("Gemma2", "Gemma2", {**_HEADS, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    ("Gemma3", "Gemma3", {**_HEADS, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    ("Mistral", "Mistral", {**_GROUPED, "sliding_window": 4}),
    ("Phi", "Phi", {**_FULL, "partial_rotary_factor": 0.5}),
    ("Phi3", "Phi3", _GROUPED),
    ("GPT-2", "GPT2", TEXT),
    ("GPT-NeoX", "GPTNeoX", {**TEXT, "rotary_pct": 0.5}),
    ("GPT-J", "GPTJ", {**TEXT, "rotary_dim": 2}),
    ("GPT-Neo", "GPTNeo", {**TEXT, "attention_types": [[["global", "local"], 1]], "num_heads": 4}),
    ("GPT-BigCode", "GPTBigCode", TEXT),
    ("CodeGen", "CodeGen", {**TEXT, "rotary_dim": 2}),
    ("OPT", "OPT", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 12}),
    ("Falcon", "Falcon", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("Bloom", "Bloom", {**TEXT, "n_layer": 2, "n_head": 4}),
    ("MPT", "Mpt", {**TEXT, "d_model": 16, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    ("Cohere", "Cohere", {**_GROUPED, "use_qk_norm": True}),
    ("Cohere2", "Cohere2", {**_GROUPED, "sliding_window": 4}),
    ("OLMo", "Olmo", _GROUPED),
    ("OLMo2", "Olmo2", _GROUPED),
    ("StableLM", "StableLm", {**_GROUPED, "partial_rotary_factor": 0.5}),
    ("StarCoder2", "Starcoder2", _GROUPED),
    ("Granite", "Granite", _GROUPED),
    ("SmolLM3", "SmolLM3", _GROUPED),
    ("GLM", "Glm", _HEADS),
    ("Nemotron", "Nemotron", _HEADS),
    ("Persimmon", "Persimmon", TEXT),
    ("BioGPT", "BioGpt", TEXT),
    ("XGLM", "XGLM", {**TEXT, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4}),
    ("MiniCPM3", "MiniCPM3", {**_LATENT}),
    ("ModernBERT decoder", "ModernBertDecoder", {**TEXT, "local_attention": 4}),
)
_MIXTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Mixtral", "Mixtral", {**_GROUPED, "num_local_experts": 4}),
    (
        "Qwen2-MoE",
        "Qwen2Moe",
        {
            **_GROUPED,
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "num_experts_per_tok": 2,
        },
    ),
    (
        "Qwen3-MoE",
        "Qwen3Moe",
        {**_HEADS, "num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    ),
    ("GPT-OSS", "GptOss", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("DeepSeek-V2", "DeepseekV2", {**_LATENT, **_LOW}),
    ("DeepSeek-V3", "DeepseekV3", {**_LATENT, **_LOW}),
    ("OLMoE", "Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    ("Phi-MoE", "Phimoe", {**_GROUPED, "num_local_experts": 4}),
    ("Granite-MoE", "GraniteMoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    (
        "GLM4-MoE",
        "Glm4Moe",
        {
            **_HEADS,
            **_LOW,
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
)


def _llama4() -> Entry:
    options = {
        **_HEADS,
        "intermediate_size_mlp": 24,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 8,
    }
    return member("Llama 4", _EXPERTS, "Llama4TextConfig", "Llama4ForCausalLM", _tokens, **options)


def _tokens() -> dict[str, Any]:
    return {**text(), "use_cache": False}


def _causal(name: str, group: str, stem: str, options: dict[str, Any]) -> Entry:
    config = "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config"
    head = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    return member(name, group, config, f"{stem}{head}", _tokens, **options)


ENTRIES: tuple[Entry, ...] = (
    *(_causal(name, _DENSE, stem, options) for name, stem, options in _DECODERS),
    *(_causal(name, _EXPERTS, stem, options) for name, stem, options in _MIXTURES),
    _llama4(),
)
