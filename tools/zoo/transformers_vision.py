"""Vision and audio models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Entry, ids, images
from lora_fx.tools.zoo.transformers_common import SIDES, member

__all__ = ["ENTRIES"]

_VISION = "transformers: vision"
_AUDIO = "transformers: audio"

_PATCHES: dict[str, Any] = {**SIDES, "image_size": 16, "patch_size": 8, "num_labels": 3}
_STAGES: dict[str, Any] = {
    "num_labels": 3,
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
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
    ("Swin v2", "Swinv2", "ForImageClassification", 32, _STAGES),
    ("Hiera", "Hiera", "ForImageClassification", 32, _HIERA),
    ("ConvNeXt", "ConvNext", "ForImageClassification", 32, _CONVNEXT),
    ("ConvNeXt v2", "ConvNextV2", "ForImageClassification", 32, _CONVNEXT),
    ("ResNet", "ResNet", "ForImageClassification", 32, _RESNET),
    ("RegNet", "RegNet", "ForImageClassification", 32, {**_RESNET, "groups_width": 4}),
    (
        "BiT",
        "Bit",
        "ForImageClassification",
        32,
        {**_RESNET, "num_groups": 4, "layer_type": "preactivation"},
    ),
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
        32,
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
    ),
)
