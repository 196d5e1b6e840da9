"""Audio models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx.tools.zoo.entries import Entry, ids
from lora_fx.tools.zoo.transformers_common import SIDES, member

__all__ = ["ENTRIES"]

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


ENTRIES: tuple[Entry, ...] = (
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
