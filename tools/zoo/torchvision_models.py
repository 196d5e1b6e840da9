"""Models of torchvision: classification, segmentation, video, and backbones of detectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.tools.zoo.entries import Built, Entry, images

__all__ = ["ENTRIES"]

_GROUP = "torchvision"

# Name, size of the image, and what makes it smaller.
_CLASSIFIERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("alexnet", 64, {}),
    ("convnext_tiny", 32, {}),
    ("efficientnet_b0", 32, {}),
    ("efficientnet_v2_s", 32, {}),
    ("googlenet", 32, {"aux_logits": False, "init_weights": False}),
    ("inception_v3", 80, {"aux_logits": False, "init_weights": False}),
    ("mnasnet0_5", 32, {}),
    ("mobilenet_v2", 32, {"width_mult": 0.25}),
    ("mobilenet_v3_small", 32, {}),
    ("regnet_x_400mf", 32, {}),
    ("regnet_y_400mf", 32, {}),
    ("resnet18", 32, {}),
    ("shufflenet_v2_x0_5", 32, {}),
    ("squeezenet1_1", 32, {}),
)
# Class and its arguments, for images of 32 pixels.
_BY_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "densenet": (
        "DenseNet",
        {"block_config": (2, 2, 2, 2), "growth_rate": 8, "num_init_features": 16},
    ),
    "swin": (
        "SwinTransformer",
        {
            "patch_size": [4, 4],
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": [4, 4],
        },
    ),
    "vit": (
        "VisionTransformer",
        {
            "image_size": 32,
            "patch_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "mlp_dim": 32,
        },
    ),
    "maxvit": (
        "MaxVit",
        {
            "input_size": (32, 32),
            "stem_channels": 8,
            "partition_size": 4,
            "block_channels": [8, 16],
            "block_layers": [1, 1],
            "head_dim": 4,
            "stochastic_depth_prob": 0.1,
        },
    ),
}
_SEGMENTERS = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_VIDEO: tuple[tuple[str, tuple[int, int]], ...] = (
    ("r3d_18", (4, 24)),
    ("mc3_18", (4, 24)),
    ("r2plus1d_18", (4, 24)),
)


def _classifier(name: str, size: int, options: dict[str, Any]) -> Built:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=5, **options), (images(size),)


def _by_class(name: str, options: dict[str, Any]) -> Built:
    from torchvision import models

    return getattr(models, name)(num_classes=5, **options), (images(32),)


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

    options = _BY_CLASS["swin"][1]
    blocks = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer(num_classes=5, **options, **blocks), (images(32),)


def _segmenter(name: str) -> Built:
    from torchvision import models

    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    return model, (images(32),)


def _video(name: str, frames: int, size: int) -> Built:
    from torchvision import models

    model = models.get_model(name, weights=None, num_classes=5)
    return model, (torch.randn(2, 3, frames, size, size),)


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


def _entry(name: str, make: Callable[..., Built], *args: Any) -> Entry:
    return Entry(f"torchvision/{name}", _GROUP, lambda: make(*args))


ENTRIES: tuple[Entry, ...] = (
    *(_entry(row[0], _classifier, *row) for row in _CLASSIFIERS),
    *(_entry(name, _by_class, *row) for name, row in _BY_CLASS.items()),
    _entry("resnet bottleneck", _bottleneck),
    _entry("resnext", lambda: _bottleneck(groups=4, width_per_group=16)),
    _entry("wide resnet", lambda: _bottleneck(width_per_group=128)),
    _entry("vgg", _vgg),
    _entry("swin_v2", _swin_v2),
    *(_entry(name, _segmenter, name) for name in _SEGMENTERS),
    *(_entry(name, _video, name, *size) for name, size in _VIDEO),
    _entry("s3d", _s3d),
    _entry("mvit", _mvit),
    _entry("swin3d", _swin3d),
    _entry("resnet18 + FPN", _resnet_fpn),
    _entry("mobilenet + FPN", _mobilenet_fpn),
    _entry("RetinaNet head", _retina_head),
    _entry("RAFT", _raft),
)
