"""What all models of transformers have in common: configuration, class, inputs by keyword."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from lora_fx.tools.zoo.entries import Built, Entry, ids

__all__ = ["SIDES", "TEXT", "built", "member", "text", "text_pair"]

SIDES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""The sizes of one tower, by the names that most configurations use."""

TEXT: dict[str, Any] = {
    **SIDES,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Those of a language model."""


def text() -> dict[str, Any]:
    """Tokens, the second row padded."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def text_pair() -> dict[str, Any]:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(length=4), "use_cache": False}


def built(config: Any, head: str, inputs: dict[str, Any]) -> Built:
    """The model of that class over a configuration."""
    import transformers

    return getattr(transformers, head)(config), inputs


def member(
    name: str,
    group: str,
    config: str,
    head: str,
    inputs: Callable[[], dict[str, Any]],
    **options: Any,
) -> Entry:
    """An entry: the class ``head`` over ``config``, both names in transformers.

    Args:
        name: After ``transformers/``.
        group: Its table.
        config: Name of the configuration's class.
        head: Name of the model's class.
        inputs: Makes the arguments.
        **options: Of the configuration.
    """

    def make() -> Built:
        transformers = importlib.import_module("transformers")
        return built(getattr(transformers, config)(**options), head, inputs())

    return Entry(f"transformers/{name}", group, make)
