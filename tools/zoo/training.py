"""Gradients and twenty steps: every adapter learns, and nothing else does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.api import trainable_parameters
from lora_fx.record import Record
from lora_fx.tools.zoo.entries import Entry, Inputs, call
from lora_fx.tools.zoo.numbers import floats
from lora_fx.tools.zoo.row import Row
from lora_fx.types import PlannedSite, Site

__all__ = ["STEPS", "Reached", "check_gradients", "train"]

STEPS = 20
_RATES = (5e-3, 5e-4, 5e-5)
_SMALLEST = 1e-7  # a gradient below it is compared with this instead


@dataclass(frozen=True)
class Reached:
    """One call of a model.

    Attributes:
        inputs: Its arguments.
        reference: What the original returns.
    """

    inputs: Inputs
    reference: Any


def check_gradients(
    entry: Entry, model: nn.Module, adapted: nn.Module, built: Reached, row: Row
) -> None:
    """One backward pass in eval mode, so that no layer is left out by chance; fills the row.

    Args:
        entry: The model's entry.
        model: The original; it is copied.
        adapted: The rewritten model, untrained.
        built: The call and the original's result.
        row: Gets ``stray``, ``missing``, ``unreached``, ``infinite`` and ``gradient_error``.
    """
    adapted.eval().zero_grad()
    _loss(entry, adapted, built).backward()  # type: ignore[no-untyped-call]
    for name, parameter in adapted.named_parameters():
        if not _is_factor(name):
            if parameter.requires_grad or parameter.grad is not None:
                row.stray.append(name)
        elif parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            row.infinite.append(name)
    full = copy.deepcopy(model).requires_grad_(requires_grad=True)
    _loss(entry, full, built).backward()  # type: ignore[no-untyped-call]
    for planned in _sites(adapted):
        site = planned.site
        weight = full.get_parameter(site.weight).grad
        a, b = _factors(adapted, site)
        if b.grad is None or a.grad is None:
            # No gradient in the original either: the call does not come to it, or drops its result.
            (row.unreached if weight is None else row.missing).append(site.name)
        elif weight is not None and not site.tied_to:
            error = _gradient_error(planned, weight, a, b)
            if error > row.gradient_error:
                row.gradient_error, row.gradient_worst = error, site.name
    adapted.zero_grad()


def _sites(adapted: nn.Module) -> tuple[PlannedSite, ...]:
    record: Record = vars(adapted)["_lora_fx"]
    return tuple(planned for adapter in record.adapters.values() for planned in adapter.sites)


def _factors(adapted: nn.Module, site: Site) -> tuple[nn.Parameter, nn.Parameter]:
    holder = adapted.get_submodule(site.holder)
    prefix = "lora_" if hasattr(holder, "lora_A") else "lora_embedding_"
    a, b = (getattr(holder, prefix + letter).default for letter in "AB")
    return a, b


def _gradient_error(
    planned: PlannedSite, weight: torch.Tensor, a: nn.Parameter, b: nn.Parameter
) -> float:
    """Beside the chain rule: at B = 0 the gradient of B is s·(dL/dW)·Aᵀ, over all uses of W.

    0 for weights whose layout is another one: grouped and transposed convolutions, experts.
    """
    site = planned.site
    if site.groups > 1 or "transpose" in site.pattern or site.experts or b.grad is None:
        return 0.0
    weight = site.applied(weight)
    if weight.dim() > 2 and not site.pattern.startswith("conv"):
        return 0.0
    weight = weight if site.layout == "out_in" else weight.T
    weight = weight if site.rows is None else weight[site.rows[0] : site.rows[1]]
    expected = planned.scale * weight.flatten(1).double() @ a.detach().flatten(1).double().T
    scale = max(float(expected.abs().max()), _SMALLEST)
    return float((b.grad.flatten(1).double() - expected).abs().max()) / scale


def train(entry: Entry, adapted: nn.Module, built: Reached) -> tuple[float, float]:
    """Twenty steps of AdamW on one batch, in eval mode.

    A model of random weights may be as steep as it likes: where the loss rises, the steps are taken
    again from the start, smaller.

    Args:
        entry: The model's entry.
        adapted: The rewritten model; it is trained.
        built: The call and the original's result.

    Returns:
        The loss before the first step and after the last.
    """
    adapted.eval()
    parameters = list(trainable_parameters(adapted))
    start = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    for rate in _RATES:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        losses = []
        for step in range(STEPS + 1):
            optimizer.zero_grad()
            loss = _loss(entry, adapted, built)
            losses.append(float(loss))
            if step < STEPS:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if losses[-1] < losses[0]:
            break
    return losses[0], losses[-1]


def _loss(entry: Entry, model: nn.Module, built: Reached) -> torch.Tensor:
    torch.manual_seed(0)
    output = call(model, built.inputs)
    if entry.loss is not None:
        return entry.loss(output)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for found, start in zip(floats(output), floats(built.reference), strict=True):
        noise = torch.randn(start.shape, generator=generator)
        if not found.requires_grad or not bool(start.isfinite().all()):
            continue
        # Away from where the model starts, by as much as its outputs vary.
        start = start.float()
        spread = (start.std() if start.numel() > 1 else start.abs()).clamp_min(1e-3)
        total = total + ((found.float() - start) / spread - noise).square().mean()
    return total


def _is_factor(name: str) -> bool:
    return ".lora_" in f".{name}"
