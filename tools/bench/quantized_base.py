"""Models over a quantised base, and PEFT's adapters over them, as the sections about QLoRA build them."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from lora_fx.adapters.quantized_base import quantize

__all__ = ["available", "quantized_base"]


def available() -> bool:
    """Whether bitsandbytes is there: it is not on every system that lora-fx runs on."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantized_base(model: nn.Module, scheme: str = "nf4") -> nn.Module:
    """A copy with every linear layer but the head in NF4: both libraries take it as their base.

    Args:
        model: Any model of ``nn.Linear``.
        scheme: A format of :func:`lora_fx.quantize`.
    """
    base: Any = quantize(model, scheme).train(model.training)
    # What transformers says of a model that it has quantised: PEFT asks for it.
    base.is_loaded_in_4bit = True
    result: nn.Module = base
    return result
