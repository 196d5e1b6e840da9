"""Vision models of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Entry, images
from lora_fx.tools.zoo.transformers_common import SIDES, member

__all__ = ["ENTRIES"]

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
