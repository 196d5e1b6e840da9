"""Models of libraries that are put together: their rows in the tables are empty."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.tools.zoo.entries import Built, ids, images

__all__ = ["ASSEMBLED"]


def _bottleneck(**options: int) -> Built:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, **options), (images(32),)


def _vgg() -> Built:
    from torchvision.models.vgg import VGG, make_layers

    layers = make_layers([16, "M", 32, "M", 64, 64, "M", 512, "M"], batch_norm=True)
    model = VGG(layers, num_classes=5, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 4096)
    return model, (images(32),)


def _swin_v2() -> Built:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    sizes: Any = ([4, 4], 16, [2, 2], [2, 4], [4, 4])
    blocks: Any = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer(*sizes, num_classes=5, **blocks), (images(32),)


def _s3d() -> Built:
    from torchvision.models.video import s3d

    model = s3d(num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own one wants 224 pixels
    return model, (torch.randn(2, 3, 16, 32, 32),)


def _mvit() -> Built:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(channels: int, outputs: int, heads: int, stride: int) -> MSBlockConfig:
        q, kv = [1, stride, stride], [1, 2, 2]
        return MSBlockConfig(heads, channels, outputs, [3, 3, 3], [3, 3, 3], q, kv)

    model = MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[block(16, 16, 1, 1), block(16, 32, 2, 2)],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=5,
    )
    return model, (torch.randn(2, 3, 4, 32, 32),)


def _swin3d() -> Built:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=5)
    return model, (torch.randn(2, 3, 4, 32, 32),)


def _resnet_fpn() -> Built:
    from torchvision.models import resnet18
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    stages = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    backbone = BackboneWithFPN(resnet18(weights=None), stages, [64, 128, 256, 512], 32)
    return backbone, (images(32),)


def _mobilenet_fpn() -> Built:
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    options = {"weights": None, "trainable_layers": 6}
    return mobilenet_backbone("mobilenet_v3_large", fpn=True, **options), (images(64),)


def _retina_head() -> Built:
    from torchvision.models.detection.retinanet import RetinaNetHead

    class OnFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = RetinaNetHead(16, 3, 4)

        def forward(self, large: torch.Tensor, small: torch.Tensor) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = self.head([large, small])
            return OrderedDict(found)

    return OnFeatures(), (images(8, 16), images(4, 16))


def _raft() -> Built:
    from torchvision.models.optical_flow import raft_small

    return raft_small(weights=None), {
        "image1": images(128),
        "image2": images(128),
        "num_flow_updates": 2,
    }


def _trocr() -> Built:
    import transformers

    sides: Any = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    decoder = transformers.TrOCRConfig(
        vocab_size=40,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        cross_attention_hidden_size=16,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**sides), decoder
    )
    given = {"pixel_values": images(16), "decoder_input_ids": ids(length=4), "use_cache": False}
    return transformers.VisionEncoderDecoderModel(config), given


ASSEMBLED: Mapping[str, Callable[[], Built]] = {
    "torchvision/resnet bottleneck": _bottleneck,
    "torchvision/resnext": functools.partial(_bottleneck, groups=4, width_per_group=16),
    "torchvision/wide resnet": functools.partial(_bottleneck, width_per_group=128),
    "torchvision/vgg": _vgg,
    "torchvision/swin_v2": _swin_v2,
    "torchvision/s3d": _s3d,
    "torchvision/mvit": _mvit,
    "torchvision/swin3d": _swin3d,
    "torchvision/resnet18 + FPN": _resnet_fpn,
    "torchvision/mobilenet + FPN": _mobilenet_fpn,
    "torchvision/RetinaNet head": _retina_head,
    "torchvision/RAFT": _raft,
    "transformers/TrOCR": _trocr,
}
"""By the name of the entry."""
