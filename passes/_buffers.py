"""Buffers that training changed (batch-norm statistics): they are part of what was learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.record import Record

__all__ = ["buffer_digests", "changed_buffers"]


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every persistent buffer, by FQN."""
    persistent = set(model.state_dict(keep_vars=True))
    return {
        name: _digest(buffer)
        for name, buffer in model.named_buffers()
        if name in persistent and buffer.device.type != "meta"
    }


def changed_buffers(model: nn.Module, record: Record) -> Iterator[tuple[str, torch.Tensor]]:
    """The persistent buffers that are not what they were at the rewrite."""
    buffers = dict(model.named_buffers())
    for name, digest in buffer_digests(model).items():
        if record.buffers.get(name, digest) != digest:
            yield name, buffers[name]


def _digest(buffer: torch.Tensor) -> str:
    data = buffer.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
