"""Encoders, and encoders with decoders, of transformers; and those that keep a state."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx.tools.zoo.entries import Entry, ids
from lora_fx.tools.zoo.transformers_common import SIDES, TEXT, member, text, text_pair

__all__ = ["ENTRIES"]

_ENCODERS = "transformers: encoders"
_BOTH = "transformers: encoder-decoders"
_STATE = "transformers: state spaces"

_SHORT = {"n_layers": 2, "n_heads": 4, "dim": 16, "hidden_dim": 24}
_DISENTANGLED = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "max_relative_positions": 8,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
}
_SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Names of the classes; the head is for classification unless said otherwise.
_BERTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("BERT", "Bert", TEXT),
    ("RoBERTa", "Roberta", TEXT),
    ("XLM-R", "XLMRoberta", TEXT),
    ("CamemBERT", "Camembert", TEXT),
    ("DeBERTa", "Deberta", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("DeBERTa-v2", "DebertaV2", {**TEXT, **_DISENTANGLED}),
    ("ModernBERT", "ModernBert", {**TEXT, "local_attention": 4, "cls_token_id": 1}),
    ("ELECTRA", "Electra", {**TEXT, "embedding_size": 12}),
    ("DistilBERT", "DistilBert", {**TEXT, **_SHORT}),
    ("ALBERT", "Albert", {**TEXT, "embedding_size": 12}),
    ("MPNet", "MPNet", TEXT),
    ("RoFormer", "RoFormer", TEXT),
    (
        "ConvBERT",
        "ConvBert",
        {**TEXT, "embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3},
    ),
    ("SqueezeBERT", "SqueezeBert", {**TEXT, "embedding_size": 16}),
    ("MobileBERT", "MobileBert", {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 16}),
    ("ESM", "Esm", {**TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    ("FNet", "FNet", TEXT),
    ("XLNet", "XLNet", {**_SPECIAL, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}),
    (
        "Funnel",
        "Funnel",
        {**_SPECIAL, "block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4},
    ),
    ("CANINE", "Canine", {**TEXT, "downsampling_rate": 2, "num_hash_buckets": 16}),
    ("I-BERT", "IBert", TEXT),
    (
        "Nyströmformer",
        "Nystromformer",
        {**TEXT, "num_landmarks": 6, "segment_means_seq_len": 6, "conv_kernel_size": 3},
    ),
)
_D_MODEL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1} | {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("attention_heads", 2), ("ffn_dim", 24))
}
_BART = {
    **TEXT,
    **_D_MODEL,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "is_encoder_decoder": True,
}
_T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_PAIRS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("T5", "T5", _T5),
    ("mT5", "MT5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    ("UMT5", "UMT5", _T5),
    ("Switch", "SwitchTransformers", {**_T5, "num_decoder_layers": 2, "num_experts": 4}),
    ("LongT5", "LongT5", {**_T5, "local_radius": 3}),
    ("BART", "Bart", _BART),
    ("mBART", "MBart", _BART),
    ("Pegasus", "Pegasus", _BART),
    ("Marian", "Marian", _BART),
    ("M2M100", "M2M100", _BART),
    ("Blenderbot", "Blenderbot", _BART),
    ("PLBART", "PLBart", _BART),
)
_SSM = {**TEXT, "state_size": 4, "expand": 2, "conv_kernel": 3, "time_step_rank": 2}
_MIXED = {**TEXT, "num_key_value_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 2}
_STATES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Mamba", "Mamba", _SSM),
    ("Mamba-2", "Mamba2", {**_SSM, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    ("FalconMamba", "FalconMamba", _SSM),
    (
        "Jamba",
        "Jamba",
        {
            **_MIXED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    (
        "Bamba",
        "Bamba",
        {
            **_MIXED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_chunk_size": 4,
        },
    ),
    (
        "RecurrentGemma",
        "RecurrentGemma",
        {**_MIXED, "lru_width": 16, "attention_window_size": 4, "head_dim": 4},
    ),
    ("RWKV", "Rwkv", {**TEXT, "attention_hidden_size": 16, "context_length": 16}),
    ("xLSTM", "xLSTM", {**TEXT, "num_heads": 2, "num_blocks": 2, "embedding_dim": 16}),
    (
        "LFM2",
        "Lfm2",
        {**TEXT, "num_key_value_heads": 2, "full_attn_idxs": [1], "block_multiple_of": 8},
    ),
    (
        "Qwen3-Next",
        "Qwen3Next",
        {
            **_MIXED,
            "head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
)


def _encoder(name: str, stem: str, options: dict[str, Any]) -> Entry:
    head = "ForMaskedLM" if stem in ("MobileBert", "ModernBert") else "ForSequenceClassification"
    inputs = _tokens_only if stem == "FNet" else text
    options = {**options, "num_labels": 3}
    return member(name, _ENCODERS, f"{stem}Config", f"{stem}{head}", inputs, **options)


def _tokens_only() -> dict[str, Any]:
    return {"input_ids": ids()}


def _no_cache() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def _pixels_and_text() -> dict[str, Any]:
    return {"inputs": torch.randint(0, 40, (2, 8))}


def _state(name: str, stem: str, options: dict[str, Any]) -> Entry:
    return member(name, _STATE, f"{stem}Config", f"{stem}ForCausalLM", _no_cache, **options)


ENTRIES: tuple[Entry, ...] = (
    *(_encoder(*row) for row in _BERTS),
    member(
        "Perceiver",
        _ENCODERS,
        "PerceiverConfig",
        "PerceiverForMaskedLM",
        _pixels_and_text,
        **SIDES,
        vocab_size=40,
        d_model=16,
        d_latents=16,
        num_latents=4,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        qk_channels=16,
        v_channels=16,
        max_position_embeddings=8,
    ),
    *(
        member(
            name,
            _BOTH,
            f"{stem}Config",
            "MarianMTModel" if stem == "Marian" else f"{stem}ForConditionalGeneration",
            text_pair,
            **options,
        )
        for name, stem, options in _PAIRS
    ),
    *(_state(*row) for row in _STATES),
)
