"""Takes everything that is lora_fx's out of a copy of a rewritten model."""

from __future__ import annotations

from torch import nn

from lora_fx.ops import AdapterModule
from lora_fx.passes._own import place_base
from lora_fx.passes._region import CONSTANT, uninstall
from lora_fx.passes._sharing import share_copy
from lora_fx.record import Record

__all__ = ["stripped"]


def stripped(model: nn.Module, record: Record) -> nn.Module:
    """A copy of the base model: its own classes, no factors, ``requires_grad`` as it was."""
    result = share_copy(model)
    for name in record.active:
        place_base(result, name, record.adapters[name].own, record.originals, keep=False)
    del result.__dict__["_lora_fx"]
    for module in list(result.modules()):
        uninstall(module)
        for name in [name for name in module._buffers if name.startswith(CONSTANT)]:
            del module._buffers[name]
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterModule):
                del module._modules[name]
    for name, parameter in result.named_parameters():
        parameter.requires_grad = name in record.trainable
    return result
