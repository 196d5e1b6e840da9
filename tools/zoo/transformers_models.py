"""Vision models of transformers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Built, Entry, ids, images

__all__ = [
    "AUDIO",
    "DECODERS",
    "ENCODERS",
    "MULTIMODAL",
    "SIDES",
    "TEXT",
    "VISION",
    "built",
    "member",
    "text",
    "text_pair",
]


SIDES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""The sizes of one tower, by the names that most configurations use."""

TEXT: dict[str, Any] = {
    **SIDES,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Those of a language model."""


def text() -> dict[str, Any]:
    """Tokens, the second row padded."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def text_pair() -> dict[str, Any]:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(length=4), "use_cache": False}


def built(config: Any, head: str, inputs: dict[str, Any]) -> Built:
    """The model of that class over a configuration."""
    import transformers

    return getattr(transformers, head)(config), inputs


def member(
    name: str,
    group: str,
    config: str,
    head: str,
    inputs: Callable[[], dict[str, Any]],
    **options: Any,
) -> Entry:
    """An entry: the class ``head`` over ``config``, both names in transformers.

    Args:
        name: After ``transformers/``.
        group: Its table.
        config: Name of the configuration's class.
        head: Name of the model's class.
        inputs: Makes the arguments.
        **options: Of the configuration.
    """

    def make() -> Built:
        transformers = importlib.import_module("transformers")
        return built(getattr(transformers, config)(**options), head, inputs())

    return Entry(f"transformers/{name}", group, make)


_AUDIO = "transformers: audio"

_SPEECH: dict[str, Any] = {
    **SIDES,
    "vocab_size": 40,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "num_labels": 3,
}
_LISTENER: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 200)}


def _mel() -> dict[str, Any]:
    features = torch.randn(2, 8, 20)
    return {"input_features": features, "decoder_input_ids": ids(length=4), "use_cache": False}


def _frames() -> dict[str, Any]:
    features = torch.randn(2, 20, 8)
    return {"input_features": features, "decoder_input_ids": ids(length=4), "use_cache": False}


def _speaker(name: str, stem: str, head: str, **options: Any) -> Entry:
    return member(name, _AUDIO, f"{stem}Config", f"{stem}{head}", _wave, **{**_SPEECH, **options})


AUDIO: tuple[Entry, ...] = (
    member(
        "Whisper",
        _AUDIO,
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _mel,
        **_LISTENER,
        num_mel_bins=8,
    ),
    member(
        "Speech2Text",
        _AUDIO,
        "Speech2TextConfig",
        "Speech2TextForConditionalGeneration",
        _frames,
        **{**_LISTENER, "max_source_positions": 20},
        input_feat_per_channel=8,
        conv_channels=16,
    ),
    _speaker("Wav2Vec2", "Wav2Vec2", "ForCTC"),
    _speaker("HuBERT", "Hubert", "ForCTC"),
    _speaker("WavLM", "WavLM", "ForCTC", num_buckets=8, max_bucket_distance=8),
    _speaker("UniSpeech", "UniSpeech", "ForCTC"),
    _speaker("SEW", "SEW", "ForCTC", squeeze_factor=2),
    _speaker("Wav2Vec2 conformer", "Wav2Vec2Conformer", "ForCTC", conv_depthwise_kernel_size=3),
    member(
        "AST",
        _AUDIO,
        "ASTConfig",
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(2, 16, 8)},
        **SIDES,
        patch_size=4,
        max_length=16,
        num_mel_bins=8,
        frequency_stride=4,
        time_stride=4,
        num_labels=3,
    ),
    member(
        "EnCodec",
        _AUDIO,
        "EncodecConfig",
        "EncodecModel",
        lambda: {"input_values": torch.randn(2, 1, 320)},
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        # By default its convolutions are weight-normed: then there is nothing that an adapter could be on.
        norm_type="time_group_norm",
    ),
)


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


DECODERS: tuple[Entry, ...] = (
    *(_causal(name, _DENSE, stem, options) for name, stem, options in _DECODERS),
    *(_causal(name, _EXPERTS, stem, options) for name, stem, options in _MIXTURES),
    _llama4(),
)


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


ENCODERS: tuple[Entry, ...] = (
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


_GROUP = "transformers: multimodal"

_IMAGE = 5  # the token that stands for a patch
_VISION_TOWER: dict[str, Any] = {**SIDES, "image_size": 16, "patch_size": 8}
_LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "model_type": "llama"}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}


def _clip() -> Built:
    import transformers

    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=_VISION_TOWER, projection_dim=12
    )
    return built(config, "CLIPModel", {"input_ids": ids(), "pixel_values": images(16)})


def _siglip() -> Built:
    import transformers

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=_VISION_TOWER)
    return built(config, "SiglipModel", {"input_ids": ids(), "pixel_values": images(16)})


def _llava() -> Built:
    import transformers

    vision = {**_VISION_TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=_LLAMA, image_token_index=_IMAGE, vision_feature_layer=-1
    )
    return built(config, "LlavaForConditionalGeneration", _with_image(4))


def _vipllava() -> Built:
    import transformers

    vision = {**_VISION_TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.VipLlavaConfig(
        vision_config=vision,
        text_config=_LLAMA,
        image_token_index=_IMAGE,
        vision_feature_layers=[-2, -1],
    )
    return built(config, "VipLlavaForConditionalGeneration", _with_image(4))


def _paligemma() -> Built:
    import transformers

    config = transformers.PaliGemmaConfig(
        vision_config={
            **_VISION_TOWER,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        text_config={**TEXT, "num_key_value_heads": 2, "head_dim": 4, "model_type": "gemma"},
        image_token_index=_IMAGE,
        projection_dim=16,
    )
    inputs = _with_image(4)
    # As its processor gives them: the prompt is 0, what the model is to say 1. Without them, and
    # without padding, its attention under SDPA is another one (docs/internals/export.md, Parity).
    inputs["token_type_ids"] = (torch.arange(8) > 5).long().expand(2, 8).contiguous()
    return built(config, "PaliGemmaForConditionalGeneration", inputs)


def _idefics3() -> Built:
    import transformers

    config = transformers.Idefics3Config(
        vision_config=_VISION_TOWER, text_config=_LLAMA, image_token_id=_IMAGE, scale_factor=2
    )
    inputs = _with_image(1)
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    return built(config, "Idefics3ForConditionalGeneration", inputs)


def _internvl() -> Built:
    import transformers

    vision = {**_VISION_TOWER, "image_size": [16, 16], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=_LLAMA, image_token_id=_IMAGE, downsample_ratio=0.5
    )
    return built(config, "InternVLForConditionalGeneration", _with_image(1))


def _blip() -> Built:
    import transformers

    text = {**TEXT, "encoder_hidden_size": 16}
    config = transformers.BlipConfig(
        text_config=text, vision_config=_VISION_TOWER, projection_dim=12
    )
    inputs = {"input_ids": ids(), "pixel_values": images(16)}
    return built(config, "BlipForConditionalGeneration", inputs)


def _blip2() -> Built:
    import transformers

    config = transformers.Blip2Config(
        vision_config=_VISION_TOWER,
        qformer_config={**SIDES, "vocab_size": 40, "encoder_hidden_size": 16},
        text_config={**TEXT, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16},
        num_query_tokens=3,
        image_token_index=_IMAGE,
    )
    return built(config, "Blip2ForConditionalGeneration", _with_image(3))


def _qwen_vl(stem: str, **vision: Any) -> Callable[[], Built]:
    def make() -> Built:
        import transformers

        sides = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, **vision}
        config = getattr(transformers, f"{stem}Config")(
            vision_config={**sides, "temporal_patch_size": 2},
            text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": _ROPE},
            image_token_id=_IMAGE,
            vision_start_token_id=6,
            vision_end_token_id=7,
            video_token_id=8,
        )
        inputs = _with_image(4)
        del inputs["pixel_values"]
        inputs["input_ids"][:, 0] = 6
        inputs["input_ids"][:, 1:5] = _IMAGE
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == _IMAGE).int()
        # Two images of 4 x 4 patches, each patch 3 colours x 2 frames x 4 x 4 pixels.
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        return built(config, f"{stem}ForConditionalGeneration", inputs)

    return make


def _vilt() -> Built:
    import transformers

    config = transformers.ViltConfig(
        **{**TEXT, **_VISION_TOWER, "num_labels": 3, "max_image_length": -1}
    )
    inputs = {"input_ids": ids(), "pixel_values": images(16)}
    return built(config, "ViltForQuestionAnswering", inputs)


def _trocr() -> Built:
    import transformers

    encoder = transformers.ViTConfig(**_VISION_TOWER)
    decoder = transformers.TrOCRConfig(
        vocab_size=40,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        cross_attention_hidden_size=16,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    inputs = {"pixel_values": images(16), "decoder_input_ids": ids(length=4), "use_cache": False}
    return built(config, "VisionEncoderDecoderModel", inputs)


def _with_image(patches: int) -> dict[str, Any]:
    tokens = ids(length=8) + 1
    tokens = torch.where(tokens == _IMAGE, _IMAGE + 4, tokens).clamp(max=39)
    tokens[:, 1 : 1 + patches] = _IMAGE
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": images(16),
        "use_cache": False,
    }


_MAKERS: dict[str, Callable[[], Built]] = {
    "CLIP": _clip,
    "SigLIP": _siglip,
    "BLIP": _blip,
    "BLIP-2": _blip2,
    "LLaVA": _llava,
    "VipLLaVA": _vipllava,
    "PaliGemma": _paligemma,
    "Idefics3": _idefics3,
    "InternVL": _internvl,
    "Qwen2-VL": _qwen_vl("Qwen2VL", embed_dim=16, hidden_size=16, mlp_ratio=2),
    "Qwen2.5-VL": _qwen_vl(
        "Qwen2_5_VL",
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=16,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
    "ViLT": _vilt,
    "TrOCR": _trocr,
}

MULTIMODAL: tuple[Entry, ...] = tuple(
    Entry(f"transformers/{name}", _GROUP, make) for name, make in _MAKERS.items()
)


_VISION = "transformers: vision"

_PATCHES: dict[str, Any] = {**SIDES, "image_size": 16, "patch_size": 8, "num_labels": 3}
_STAGES: dict[str, Any] = {
    "num_labels": 3,
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],  # every second layer of a stage shifts its windows
    "num_heads": [2, 2],
    "window_size": 4,
}
_RESNET: dict[str, Any] = {
    "num_labels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
_CONVNEXT: dict[str, Any] = {**_RESNET, "num_stages": 2}
_HIERA: dict[str, Any] = {
    "num_labels": 3,
    "image_size": [32, 32],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
}
_DETR_BACKBONE: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR: dict[str, Any] = {
    "backbone_config": _DETR_BACKBONE,
    "num_labels": 3,
    "num_queries": 5,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
_LOOKERS: tuple[tuple[str, str, str, int, dict[str, Any]], ...] = (
    ("ViT", "ViT", "ForImageClassification", 16, _PATCHES),
    ("DeiT", "Deit", "ForImageClassification", 16, _PATCHES),
    (
        "BEiT",
        "Beit",
        "ForImageClassification",
        16,
        {**_PATCHES, "use_relative_position_bias": True},
    ),
    ("DINOv2", "Dinov2", "ForImageClassification", 16, _PATCHES),
    ("DINOv3", "DINOv3ViT", "Model", 16, _PATCHES),
    ("ViT-MAE", "ViTMAE", "Model", 16, {**_PATCHES, "mask_ratio": 0.0}),
    ("ViT-MSN", "ViTMSN", "ForImageClassification", 16, _PATCHES),
    ("I-JEPA", "IJepa", "ForImageClassification", 16, _PATCHES),
    ("YOLOS", "Yolos", "ForObjectDetection", 16, {**_PATCHES, "image_size": [16, 16]}),
    ("Swin", "Swin", "ForImageClassification", 32, _STAGES),
    (
        "Swin v2",
        "Swinv2",
        "ForImageClassification",
        16,
        # One stage: a graph of the whole model with shifted windows takes long to make.
        {**_STAGES, "image_size": 16, "depths": [2], "num_heads": [2]},
    ),
    ("Hiera", "Hiera", "ForImageClassification", 32, _HIERA),
    ("ConvNeXt", "ConvNext", "ForImageClassification", 32, _CONVNEXT),
    ("ConvNeXt v2", "ConvNextV2", "ForImageClassification", 32, _CONVNEXT),
    ("ResNet", "ResNet", "ForImageClassification", 32, _RESNET),
    ("RegNet", "RegNet", "ForImageClassification", 32, {**_RESNET, "groups_width": 4}),
    (
        "PoolFormer",
        "PoolFormer",
        "ForImageClassification",
        32,
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3},
    ),
    (
        "SegFormer",
        "Segformer",
        "ForSemanticSegmentation",
        32,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 3,
        },
    ),
    (
        "PVT v2",
        "PvtV2",
        "ForImageClassification",
        64,
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
            "num_labels": 3,
        },
    ),
    ("MobileNet v2", "MobileNetV2", "ForImageClassification", 32, {"depth_multiplier": 0.35}),
    (
        "DPT",
        "DPT",
        "ForDepthEstimation",
        32,
        {
            **_PATCHES,
            "image_size": 32,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
    ),
    (
        "LeViT",
        "Levit",
        "ForImageClassification",
        64,
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 16],
            "key_dim": [4, 4, 4],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "num_labels": 3,
        },
    ),
    ("DETR", "Detr", "ForObjectDetection", 64, _DETR),
    ("Conditional DETR", "ConditionalDetr", "ForObjectDetection", 64, _DETR),
)


def _pixels(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": images(size)}


def _video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


VISION: tuple[Entry, ...] = (
    *(
        member(
            name,
            _VISION,
            {"Deit": "DeiTConfig"}.get(stem, f"{stem}Config"),
            {"Deit": "DeiT"}.get(stem, stem) + head,
            _pixels(size),
            **options,
        )
        for name, stem, head, size, options in _LOOKERS
    ),
    dataclasses.replace(
        member(
            "BiT",
            _VISION,
            "BitConfig",
            "BitForImageClassification",
            _pixels(32),
            **{**_RESNET, "num_groups": 4, "layer_type": "preactivation"},
        ),
        targets=("classifier.1",),
        note="its convolutions compute their weights, so that there is the head alone to adapt",
    ),
    member(
        "VideoMAE",
        _VISION,
        "VideoMAEConfig",
        "VideoMAEForVideoClassification",
        _video,
        **{**_PATCHES, "num_frames": 4},
    ),
    member(
        "TimeSformer",
        _VISION,
        "TimesformerConfig",
        "TimesformerForVideoClassification",
        _video,
        **{**_PATCHES, "num_frames": 4},
    ),
)
