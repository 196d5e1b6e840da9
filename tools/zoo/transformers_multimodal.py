"""Models of transformers for images and text at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Built, Entry, ids, images
from lora_fx.tools.zoo.transformers_common import SIDES, TEXT, built

__all__ = ["ENTRIES"]

_GROUP = "transformers: multimodal"

_IMAGE = 5  # the token that stands for a patch
_VISION: dict[str, Any] = {**SIDES, "image_size": 16, "patch_size": 8}
_LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "model_type": "llama"}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}


def _clip() -> Built:
    import transformers

    config = transformers.CLIPConfig(text_config=TEXT, vision_config=_VISION, projection_dim=12)
    return built(config, "CLIPModel", {"input_ids": ids(), "pixel_values": images(16)})


def _siglip() -> Built:
    import transformers

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=_VISION)
    return built(config, "SiglipModel", {"input_ids": ids(), "pixel_values": images(16)})


def _llava() -> Built:
    import transformers

    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=_LLAMA, image_token_index=_IMAGE, vision_feature_layer=-1
    )
    return built(config, "LlavaForConditionalGeneration", _with_image(4))


def _vipllava() -> Built:
    import transformers

    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16}
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
        vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "num_key_value_heads": 2, "head_dim": 4, "model_type": "gemma"},
        image_token_index=_IMAGE,
        projection_dim=16,
    )
    inputs = _with_image(4)
    # As its processor gives them: the prompt is 0, what the model is to say 1. Without them, and
    # without padding, its attention under SDPA is another one (docs/architecture.md, Parity).
    inputs["token_type_ids"] = (torch.arange(8) > 5).long().expand(2, 8).contiguous()
    return built(config, "PaliGemmaForConditionalGeneration", inputs)


def _idefics3() -> Built:
    import transformers

    config = transformers.Idefics3Config(
        vision_config=_VISION, text_config=_LLAMA, image_token_id=_IMAGE, scale_factor=2
    )
    inputs = _with_image(1)
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    return built(config, "Idefics3ForConditionalGeneration", inputs)


def _internvl() -> Built:
    import transformers

    vision = {**_VISION, "image_size": [16, 16], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=_LLAMA, image_token_id=_IMAGE, downsample_ratio=0.5
    )
    return built(config, "InternVLForConditionalGeneration", _with_image(1))


def _blip() -> Built:
    import transformers

    text = {**TEXT, "encoder_hidden_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    inputs = {"input_ids": ids(), "pixel_values": images(16)}
    return built(config, "BlipForConditionalGeneration", inputs)


def _blip2() -> Built:
    import transformers

    config = transformers.Blip2Config(
        vision_config=_VISION,
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

    config = transformers.ViltConfig(**{**TEXT, **_VISION, "num_labels": 3, "max_image_length": -1})
    inputs = {"input_ids": ids(), "pixel_values": images(16)}
    return built(config, "ViltForQuestionAnswering", inputs)


def _trocr() -> Built:
    import transformers

    encoder = transformers.ViTConfig(**_VISION)
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

ENTRIES: tuple[Entry, ...] = tuple(
    Entry(f"transformers/{name}", _GROUP, make) for name, make in _MAKERS.items()
)
