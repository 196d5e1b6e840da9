"""What models of libraries take, by the names that their tables use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Inputs, ids, images

__all__ = ["inputs_of"]

_PATCH = 5  # the token that stands for a patch


def inputs_of(words: str) -> Inputs:
    """The arguments of one call.

    Args:
        words: A name, and the numbers that it takes.
    """
    name, *numbers = words.split()
    return _INPUTS[name](*map(int, numbers))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape)


def _text() -> dict[str, Any]:
    """Tokens, the second row padded."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _decoded(**given: torch.Tensor) -> dict[str, Any]:
    return {**given, "decoder_input_ids": ids(length=4), "use_cache": False}


def _image_tokens(patches: int) -> dict[str, Any]:
    tokens = ids(length=8) + 1
    tokens = torch.where(tokens == _PATCH, _PATCH + 4, tokens).clamp(max=39)
    tokens[:, 1 : 1 + patches] = _PATCH
    mask = torch.ones_like(tokens)
    given = {"input_ids": tokens, "attention_mask": mask, "pixel_values": images(16)}
    return {**given, "use_cache": False}


def _prompted_image() -> dict[str, Any]:
    # As its processor gives them: the prompt is 0, what the model is to say 1. Without them, and
    # without padding, its attention under SDPA is another one (docs/internals/export.md, Parity).
    kinds = (torch.arange(8) > 5).long().expand(2, 8).contiguous()
    return {**_image_tokens(4), "token_type_ids": kinds}


def _listed_image() -> dict[str, Any]:
    found = _image_tokens(1)
    return {**found, "pixel_values": found["pixel_values"][:, None]}


def _image_grid() -> dict[str, Any]:
    found = _image_tokens(4)
    del found["pixel_values"]
    found["input_ids"][:, 0] = 6
    found["input_ids"][:, 1:5] = _PATCH
    found["mm_token_type_ids"] = (found["input_ids"] == _PATCH).int()
    # Two images of 4 x 4 patches, each patch 3 colors x 2 frames x 4 x 4 pixels.
    found["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    found["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return found


_TIMES = {"timestep": torch.tensor([3, 7])}


def _noisy() -> dict[str, Any]:
    return {"sample": images(8, 4), **_TIMES, "encoder_hidden_states": _random(5, 12)}


def _captioned() -> dict[str, Any]:
    return {"hidden_states": images(8, 4), "encoder_hidden_states": _random(5, 12), **_TIMES}


def _positioned() -> dict[str, Any]:
    return {
        "hidden_states": _random(16, 4),
        "encoder_hidden_states": _random(5, 12),
        "pooled_projections": _random(10),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }


_UNSIZED = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

_INPUTS: Mapping[str, Callable[..., Inputs]] = {
    "images": lambda size: (images(size),),
    "random": lambda *shape: (_random(*shape),),
    "text": _text,
    "tokens": lambda: {**_text(), "use_cache": False},
    "ids": lambda: {"input_ids": ids()},
    "ids_uncached": lambda: {"input_ids": ids(), "use_cache": False},
    "bytes": lambda: {"inputs": torch.randint(0, 40, (2, 8))},
    "pair": lambda: _decoded(input_ids=ids()),
    "wave": lambda: {"input_values": _random(200)},
    "sound": lambda *shape: {"input_values": _random(*shape)},
    "mel": lambda: _decoded(input_features=_random(8, 20)),
    "frames": lambda: _decoded(input_features=_random(20, 8)),
    "pixels": lambda size: {"pixel_values": images(size)},
    "video": lambda: {"pixel_values": _random(4, 3, 16, 16)},
    "text_image": lambda: {"input_ids": ids(), "pixel_values": images(16)},
    "image_tokens": _image_tokens,
    "prompted_image": _prompted_image,
    "listed_image": _listed_image,
    "image_grid": _image_grid,
    "sample": lambda size: {"sample": images(size)},
    "noisy": _noisy,
    "noisy_image": lambda: {"sample": images(8), **_TIMES},
    "controlled": lambda: {**_noisy(), "controlnet_cond": images(64)},
    "captioned": _captioned,
    "captioned_size": lambda: {**_captioned(), **_UNSIZED},
    "pooled": lambda: {
        "hidden_states": images(8, 4),
        "encoder_hidden_states": _random(5, 12),
        "pooled_projections": _random(10),
        **_TIMES,
    },
    "positioned": _positioned,
    "classified": lambda: {
        "hidden_states": images(8, 4),
        **_TIMES,
        "class_labels": torch.tensor([1, 2]),
    },
}
