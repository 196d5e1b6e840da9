"""Denoisers, autoencoders and a control network of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Built, Entry, images

__all__ = ["ENTRIES"]

_GROUP = "diffusers"

_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_CROSS: dict[str, Any] = {
    **_BLOCKS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def _made(name: str, inputs: dict[str, Any], **options: Any) -> Built:
    import diffusers

    return getattr(diffusers, name)(**options), {**inputs, "return_dict": False}


def _denoising(channels: int = 4, size: int = 8, width: int = 12) -> dict[str, Any]:
    return {
        "sample": images(size, channels),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, width),
    }


def _unet() -> Built:
    up = ("UpBlock2D", "CrossAttnUpBlock2D")
    options = {**_CROSS, "up_block_types": up, "sample_size": 8}
    return _made("UNet2DConditionModel", _denoising(), **options)


def _unconditional() -> Built:
    inputs = {"sample": images(8), "timestep": torch.tensor([3, 7])}
    return _made(
        "UNet2DModel",
        inputs,
        **_BLOCKS,
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


def _controlnet() -> Built:
    inputs = {**_denoising(), "controlnet_cond": images(64)}
    options = {**_CROSS, "conditioning_embedding_out_channels": (4, 8, 8, 8)}
    return _made("ControlNetModel", inputs, **options)


def _autoencoder() -> Built:
    return _made(
        "AutoencoderKL",
        {"sample": images(16)},
        **_BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )


def _tiny_autoencoder() -> Built:
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return _made("AutoencoderTiny", {"sample": images(16)}, **sizes, **blocks)


def _vq() -> Built:
    return _made(
        "VQModel",
        {"sample": images(16)},
        **_BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
    )


def _sd3() -> Built:
    inputs = {
        "hidden_states": images(8, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([3, 7]),
    }
    return _made(
        "SD3Transformer2DModel",
        inputs,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )


def _flux() -> Built:
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    return _made(
        "FluxTransformer2DModel",
        inputs,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
    )


def _pixart() -> Built:
    inputs = {
        "hidden_states": images(8, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return _made(
        "PixArtTransformer2DModel",
        inputs,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=1,
    )


def _dit() -> Built:
    inputs = {
        "hidden_states": images(8, 4),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    return _made(
        "DiTTransformer2DModel",
        inputs,
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=8,
    )


def _sana() -> Built:
    inputs = {
        "hidden_states": images(8, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 7]),
    }
    return _made(
        "SanaTransformer2DModel",
        inputs,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
    )


_MAKERS: dict[str, Callable[[], Built]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unconditional,
    "ControlNetModel": _controlnet,
    "AutoencoderKL": _autoencoder,
    "AutoencoderTiny": _tiny_autoencoder,
    "VQModel": _vq,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "SanaTransformer2DModel": _sana,
}

ENTRIES: tuple[Entry, ...] = tuple(
    Entry(f"diffusers/{name}", _GROUP, make) for name, make in _MAKERS.items()
)
