"""Tiny models of transformers that generate text, with weights that make their tokens differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.export.session import OnnxSession

Pair = tuple[Any, OnnxSession]

VOCABULARY = 61
LIMIT = 40
SWITCH = 12  # the length beyond which the positions of "phi3" have other frequencies

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SEQUENCES = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_ATTENTION = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


def generator(kind: str) -> Any:
    """A model of that family, in eval mode, the same one each time."""
    transformers = pytest.importorskip("transformers")
    name, config = _built(kind)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    model.tie_weights()
    return model


def example(kind: str) -> Tensor:
    """What a model of that family is exported with."""
    return torch.randn(1, 4, 16) if kind == "whisper" else torch.arange(3, 10)[None]


def _built(kind: str) -> tuple[str, Any]:
    t = pytest.importorskip("transformers")
    match kind:
        case "llama":
            return "LlamaForCausalLM", t.LlamaConfig(**_SMALL)
        case "mistral":
            return "MistralForCausalLM", t.MistralConfig(**_SMALL, sliding_window=4)
        case "qwen3":
            return "Qwen3ForCausalLM", t.Qwen3Config(**_SMALL, head_dim=8)
        case "phi3":
            rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
            rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 5.0]}
            config = t.Phi3Config(
                **_SMALL,
                original_max_position_embeddings=SWITCH,
                rope_parameters=rope | {"original_max_position_embeddings": SWITCH},
            )
            return "Phi3ForCausalLM", config
        case "gemma":
            layers = ["sliding_attention", "full_attention"]
            config = t.Gemma3TextConfig(
                **_SMALL,
                head_dim=8,
                sliding_window=4,
                layer_types=layers,
                query_pre_attn_scalar=8,
                tie_word_embeddings=False,
            )
            return "Gemma3ForCausalLM", config
        case "gpt2":
            config = t.GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LIMIT,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
            return "GPT2LMHeadModel", config
        case "t5":
            config = t.T5Config(
                **_SEQUENCES, tie_word_embeddings=False, d_kv=8, d_ff=24, num_layers=2, num_heads=2
            )
            return "T5ForConditionalGeneration", config
        case "whisper":
            config = t.WhisperConfig(
                **_SEQUENCES, **_ATTENTION, num_mel_bins=4, max_source_positions=8,
                max_target_positions=LIMIT, suppress_tokens=None, begin_suppress_tokens=None,
            )  # fmt: skip
            return "WhisperForConditionalGeneration", config
        case _:
            layers = _ATTENTION | {"decoder_layers": 1}
            config = t.BartConfig(**_SEQUENCES, **layers, max_position_embeddings=LIMIT)
            return "BartForConditionalGeneration", config
