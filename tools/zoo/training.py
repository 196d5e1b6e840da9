"""Gradients and twenty steps: every adapter learns, and nothing else does."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lora_fx.api import trainable_parameters
from lora_fx.tools.zoo.entries import Entry, Inputs, call
from lora_fx.tools.zoo.numbers import floats
from lora_fx.tools.zoo.row import Row

__all__ = ["STEPS", "check_gradients", "train"]

STEPS = 20
_RATE = 5e-3


def check_gradients(
    entry: Entry,
    adapted: nn.Module,
    inputs: Inputs,
    reference: object,
    row: Row,
    unused: Collection[str],
) -> None:
    """One backward pass in eval mode, so that no layer is left out by chance; fills the row.

    Args:
        entry: The model's entry.
        adapted: The rewritten model, untrained.
        inputs: Of one call.
        reference: The original's output.
        row: Gets ``stray``, ``missing``, ``unreached``, ``infinite`` and ``idle``.
        unused: Holders of factors whose operation this call does not come to.
    """
    adapted.eval().zero_grad()
    _loss(entry, adapted, inputs, reference).backward()  # type: ignore[no-untyped-call]
    for name, parameter in adapted.named_parameters():
        if not _is_factor(name):
            if parameter.requires_grad or parameter.grad is not None:
                row.stray.append(name)
        elif parameter.grad is None:
            holder = name.rpartition(".lora_")[0]
            (row.unreached if holder in unused else row.missing).append(name)
        elif not bool(parameter.grad.isfinite().all()):
            row.infinite.append(name)
        elif _is_second(name) and not bool(parameter.grad.any()):
            row.idle.append(name)
    adapted.zero_grad()


def train(
    entry: Entry, adapted: nn.Module, inputs: Inputs, reference: object
) -> tuple[float, float]:
    """Twenty steps of AdamW on one batch, in eval mode.

    Args:
        entry: The model's entry.
        adapted: The rewritten model; it is trained.
        inputs: Of one call.
        reference: The original's output.

    Returns:
        The loss before the first step and after the last.
    """
    adapted.eval()
    optimizer = torch.optim.AdamW(trainable_parameters(adapted), lr=_RATE)
    losses = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss = _loss(entry, adapted, inputs, reference)
        losses.append(float(loss))
        if step < STEPS:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return losses[0], losses[-1]


def _loss(entry: Entry, model: nn.Module, inputs: Inputs, reference: object) -> torch.Tensor:
    torch.manual_seed(0)
    output = call(model, inputs)
    if entry.loss is not None:
        return entry.loss(output)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for found, start in zip(floats(output), floats(reference), strict=True):
        if not found.requires_grad or not bool(start.isfinite().all()):
            continue
        # Away from where the model starts, by as much as its outputs vary.
        spread = (start.float().std() if start.numel() > 1 else start.float().abs()).clamp_min(1e-3)
        target = start.float() + spread * torch.randn(start.shape, generator=generator)
        total = total + ((found.float() - target) / spread).square().mean()
    return total


def _is_factor(name: str) -> bool:
    return ".lora_" in f".{name}"


def _is_second(name: str) -> bool:
    return ".lora_B." in f".{name}" or ".lora_embedding_B." in f".{name}"
