"""One small member of each family of timm."""

from __future__ import annotations

import importlib
from typing import Any

from lora_fx.tools.zoo.entries import Built, Entry, images

__all__ = ["ENTRIES"]

_GROUP = "timm"

_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2}
_TWO_HEADS: dict[str, Any] = {**_VIT, "num_heads": 2}
_FOUR = {"depths": (1, 1, 1, 1)}

# Family, model (or its class, where the model has no options), size of the image, and what makes it
# smaller.
_MODELS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("beit", "beit_base_patch16_224", 32, _TWO_HEADS),
    ("byoanet", "botnet26t_256", 64, {"img_size": 64}),
    ("byobnet", "resnet26t", 32, {}),
    ("cait", "cait_xxs24_224", 32, _TWO_HEADS),
    ("coat", "coat_lite_tiny", 64, {"img_size": 64}),
    ("convit", "convit_tiny", 32, {**_VIT, "num_heads": 4, "local_up_to_layer": 1}),
    ("convmixer", "convmixer.ConvMixer", 32, {"dim": 16, "depth": 2}),
    ("convnext", "convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ("crossvit", "crossvit_tiny_240", 120, {"img_size": 120}),
    ("cspnet", "cspresnet50", 32, {}),
    (
        "davit",
        "davit_tiny",
        64,
        {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), **_FOUR},
    ),
    ("deit", "deit_tiny_distilled_patch16_224", 32, _TWO_HEADS),
    ("densenet", "densenet121", 32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    ("dla", "dla34", 32, {}),
    ("dpn", "dpn48b", 32, {}),
    ("edgenext", "edgenext_xx_small", 64, {}),
    ("efficientformer", "efficientformer_l1", 224, {}),
    ("efficientformer_v2", "efficientformerv2_s0", 64, {"img_size": 64}),
    ("efficientnet", "efficientnet_lite0", 32, {}),
    ("efficientvit_mit", "efficientvit_b0", 32, {}),
    ("efficientvit_msra", "efficientvit_m0", 64, {"img_size": 64}),
    (
        "eva",
        "eva02_tiny_patch14_224",
        28,
        {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
    ("fasternet", "fasternet_t0", 32, {}),
    ("fastvit", "fastvit_t8", 64, {}),
    ("focalnet", "focalnet.FocalNet", 64, {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    ("gcvit", "gcvit_xxtiny", 64, {"img_size": 64}),
    ("ghostnet", "ghostnet_050", 32, {}),
    ("hardcorenas", "hardcorenas_a", 32, {}),
    ("hgnet", "hgnetv2_b0", 32, {}),
    ("hiera", "hiera_tiny_224", 64, {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)}),
    ("hrnet", "hrnet_w18_small", 32, {}),
    ("inception_next", "inception_next_atto", 32, {}),
    ("inception_v3", "inception_v3", 80, {}),
    ("levit", "levit_128s", 64, {"img_size": 64}),
    ("mambaout", "mambaout_femto", 32, {}),
    ("maxxvit", "coatnet_pico_rw_224", 64, {"img_size": 64}),
    ("metaformer", "metaformer.MetaFormer", 32, {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}),
    ("mlp_mixer", "mlp_mixer.MlpMixer", 32, {"img_size": 32, "num_blocks": 2, "embed_dim": 16}),
    ("mobilenetv3", "mobilenetv3_small_050", 32, {}),
    ("mobilevit", "mobilevit_xxs", 64, {}),
    ("mvitv2", "mvitv2_tiny", 64, {"img_size": 64}),
    (
        "nest",
        "nest.Nest",
        32,
        {"img_size": 32, "embed_dims": (8, 8, 16), "num_heads": (1, 1, 2), "depths": (1, 1, 1)},
    ),
    ("nextvit", "nextvit_small", 64, {}),
    ("nfnet", "nf_regnet_b0", 32, {}),
    ("pit", "pit_ti_224", 64, {"img_size": 64}),
    ("pvt_v2", "pvt_v2_b0", 64, {}),
    ("rdnet", "rdnet_tiny", 32, {}),
    ("regnet", "regnetx_002", 32, {}),
    ("repghost", "repghostnet_050", 32, {}),
    ("repvit", "repvit_m0_9", 32, {}),
    ("res2net", "res2net50_26w_4s", 32, {"layers": (1, 1, 1, 1)}),
    ("resnest", "resnest14d", 32, {}),
    ("resnet", "resnet10t", 32, {}),
    ("resnetv2", "resnetv2_50", 32, {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)}),
    ("rexnet", "rexnetr_100", 32, {}),
    ("selecsls", "selecsls42b", 32, {}),
    ("senet", "legacy_seresnet18", 32, {}),
    (
        "sequencer",
        "sequencer2d_s",
        64,
        {
            "img_size": 64,
            "embed_dims": (8, 8, 8, 8),
            "hidden_sizes": (4, 4, 4, 4),
            "layers": (1, 1, 1, 1),
        },
    ),
    ("shvit", "shvit_s1", 64, {}),
    ("sknet", "skresnet18", 32, {}),
    ("starnet", "starnet_s1", 32, {}),
    ("swiftformer", "swiftformer_xs", 64, {}),
    (
        "swin_transformer",
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    (
        "swin_transformer_v2",
        "swinv2_tiny_window8_256",
        64,
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    (
        "swin_transformer_v2_cr",
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    (
        "tiny_vit",
        "tiny_vit.TinyVit",
        64,
        {"embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    ("tnt", "tnt_s_legacy_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("tresnet", "tresnet_m", 32, {}),
    ("twins", "twins_svt_small", 64, {"img_size": 64}),
    ("vgg", "vgg.VGG", 32, {"cfg": (16, "M", 32, "M", 64, "M"), "mlp_ratio": 0.0625}),
    ("visformer", "visformer_tiny", 64, {"img_size": 64}),
    ("vision_transformer", "vit_tiny_patch16_224", 32, _TWO_HEADS),
    ("vision_transformer_relpos", "vit_relpos_small_patch16_224", 32, _TWO_HEADS),
    (
        "vision_transformer_sam",
        "samvit_base_patch16_224",
        64,
        {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)},
    ),
    ("vitamin", "vitamin_small_224", 64, {"img_size": 64}),
    (
        "volo",
        "volo.VOLO",
        64,
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 32, 32),
            "num_heads": (1, 2, 2, 2),
            "downsamples": (True, False, False, False),
            "outlook_attention": (True, False, False, False),
        },
    ),
    ("vovnet", "ese_vovnet19b_slim", 32, {}),
    ("xception_aligned", "xception41", 32, {}),
    (
        "xcit",
        "xcit_nano_12_p16_224",
        32,
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
)


def _built(name: str, size: int, options: dict[str, Any]) -> Built:
    import timm

    module, _, class_name = name.partition(".")
    if class_name:
        made = getattr(importlib.import_module(f"timm.models.{module}"), class_name)
        return made(num_classes=5, **options), (images(size),)
    return timm.create_model(name, pretrained=False, num_classes=5, **options), (images(size),)


def _entry(family: str, name: str, size: int, options: dict[str, Any]) -> Entry:
    return Entry(f"timm/{family}", _GROUP, lambda: _built(name, size, options))


ENTRIES: tuple[Entry, ...] = tuple(_entry(*row) for row in _MODELS)
