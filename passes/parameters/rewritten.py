"""Tells the ``Trainer`` of transformers whether a quantised model has adapters.

It refuses to train a model that ``is_quantized`` unless PEFT wraps it: nothing in such a model could be
trained. With adapters in it that is not so, and the attribute says no more than that.
"""

from __future__ import annotations

from torch import nn

__all__ = ["mark_adapted"]


def mark_adapted(model: nn.Module, *, adapted: bool) -> None:
    """Writes ``is_quantized`` where transformers has quantised: whether weights are all that there is.

    Args:
        model: A model of lora_fx's own.
        adapted: Whether it has adapters.
    """
    for module in model.modules():
        if module.__dict__.get("hf_quantizer") is not None:
            module.__dict__["is_quantized"] = not adapted
