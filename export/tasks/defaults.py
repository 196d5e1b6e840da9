"""What a file remembers for generation: the model's own defaults, and how long it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["ENCODER_KEY", "GENERATION_KEY", "TASK_KEY", "generation_metadata", "position_limit"]

TASK_KEY = "lora_fx.task"
GENERATION_KEY = "lora_fx.generation"
ENCODER_KEY = "lora_fx.encoder"

# Largest number of positions, by the names that configurations of decoders have for it.
_LIMITS = ("max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")

_READING_ANEW = ("phi3", "phimoe", "phi4_multimodal")


def generation_metadata(model: nn.Module, task: str) -> dict[str, str]:
    """The metadata of the file of a decoder.

    ``lora_fx.generation`` is JSON: ``defaults`` has the fields of the model's ``generation_config``
    that are set, ``limit`` the number of positions that it has, prompt included, or null, and
    ``prepends_start`` says whether a decoder's prompt has to begin with its first token, and
    ``reads_anew_after`` is the length beyond which a cache is of no use any more, or null.
    """
    remembered = {
        "defaults": _defaults(model),
        "limit": position_limit(model),
        "prepends_start": not _starts_freely(model),
        "reads_anew_after": _reads_anew_after(model),
    }
    return {TASK_KEY: task, GENERATION_KEY: json.dumps(remembered, sort_keys=True)}


def position_limit(model: nn.Module) -> int | None:
    """How many tokens a decoder has positions for; None where there is no limit."""
    config: Any = model.config
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        return None  # T5's distances have no end; its n_positions says what it was trained on
    decoder = config.get_text_config(decoder=True)
    for name in _LIMITS:
        value = getattr(decoder, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _reads_anew_after(model: nn.Module) -> int | None:
    """Where transformers gives the cache up: its keys were turned by the frequencies of short texts.

    Others than the Phi family go on with such keys under LongRoPE (2402.13753), in transformers and in
    the file alike.
    """
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    rope = getattr(decoder, "rope_parameters", None) or {}
    if config.model_type not in _READING_ANEW or rope.get("rope_type") != "longrope":
        return None
    length: int = decoder.original_max_position_embeddings
    return length


def _starts_freely(model: nn.Module) -> bool:
    config: Any = model.config
    return config.model_type == "whisper" or "donut" in type(model).__name__.lower()


def _defaults(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return {}
    found: Mapping[str, Any] = config.to_dict()
    return {
        name: value
        for name, value in found.items()
        if value is not None and not name.startswith("_") and _is_json(value)
    }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
