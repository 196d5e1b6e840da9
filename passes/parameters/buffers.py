"""Buffers that training changed (batch-norm statistics): they are part of what was learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.ir.record import Record
from lora_fx.ir.values import join
from lora_fx.passes.parameters.by_hand import replaced_modules

__all__ = ["buffer_digests", "changed_buffers", "persistent_buffers"]


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict has, by FQN.

    No state dict is made for it: quantised embeddings of bitsandbytes refuse that.
    """
    kept = {
        join(fqn, key)
        for fqn, module in model.named_modules(remove_duplicate=False)
        # A script module has them in something that says its keys by no iteration.
        for key in module._buffers.keys()  # noqa: SIM118
        if key not in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every persistent buffer, by FQN."""
    found = persistent_buffers(model).items()
    return {name: _digest(buffer) for name, buffer in found if buffer.device.type != "meta"}


def changed_buffers(model: nn.Module, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers that are not what they were at the rewrite, or whose module is new."""
    buffers = dict(model.named_buffers())
    new = tuple(f"{name}." for name in replaced_modules(model, record))
    for name, digest in buffer_digests(model).items():
        if name.startswith(new) or record.buffers.get(name, digest) != digest:
            yield name, buffers[name]


def _digest(buffer: torch.Tensor) -> str:
    data = buffer.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
