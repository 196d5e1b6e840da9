"""Puts what a site starts with into a model: factors, and the weight that they were taken out of.

Whatever is replaced is the model's own: a changed weight is a new parameter in the place of the shared
one, at the adapted module alone. What is tied to it elsewhere keeps the old one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

from lora_fx.ops import AdapterFactors
from lora_fx.passes._factors import factor_names
from lora_fx.passes._sharing import storage_of
from lora_fx.passes._starts import Start
from lora_fx.types import PlannedSite, Site

__all__ = [
    "START_A",
    "START_B",
    "changed_weights",
    "factors_module",
    "place_start",
    "start_factors",
]

START_A: Final = "lora_A_start"
"""Holds what A was at the start, where that was taken out of the base: saving needs it."""

START_B: Final = "lora_B_start"
"""Likewise for B."""


def place_start(model: nn.Module, row: PlannedSite, adapter: str, start: Start) -> None:
    """Puts a start in, in the place of the adapter's former one if there is one."""
    for name, value in zip(factor_names(row), (start.a, start.b), strict=True):
        factors_module(model, row.site, name).add(adapter, value)
    if start.subtracted:
        for name, value in ((START_A, start.a), (START_B, start.b)):
            # Copies: training writes into the others.
            factors_module(model, row.site, name).add(adapter, value.clone(), trained=False)
    if start.weight is not None:
        owner = model.get_submodule(row.site.owner)
        frozen = nn.Parameter(start.weight, requires_grad=False)
        frozen.__dict__.update(owner._parameters[row.site.parameter].__dict__)
        owner._parameters[row.site.parameter] = frozen


def start_factors(
    model: nn.Module, row: PlannedSite, adapter: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The A and B that were taken out of the base; None if nothing was."""
    holder = model.get_submodule(row.site.holder)
    kept = [holder._modules.get(name) for name in (START_A, START_B)]
    found = [one.get_parameter(adapter) for one in kept if one is not None and _has(one, adapter)]
    return (found[0].detach(), found[1].detach()) if len(found) == 2 else None


def changed_weights(
    model: nn.Module, original: nn.Module, rows: Iterable[PlannedSite]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the sites that are not the original's any more, and the original's, by FQN."""
    bases, originals = {}, {}
    for name in dict.fromkeys(row.site.weight for row in rows):
        new, old = model.get_parameter(name), original.get_parameter(name)
        if storage_of(new) != storage_of(old):
            bases[name], originals[name] = new.detach(), old.detach()
    return bases, originals


def factors_module(model: nn.Module, site: Site, name: str) -> AdapterFactors:
    """The module that holds a factor of a site for every adapter; made if it is not there."""
    holder = _holder(model, site)
    if name not in holder._modules:
        holder.add_module(name, AdapterFactors())
    factors = holder.get_submodule(name)
    assert isinstance(factors, AdapterFactors)
    factors.train(holder.training)
    return factors


def _has(module: nn.Module, name: str) -> bool:
    return name in module._parameters


def _holder(model: nn.Module, site: Site) -> nn.Module:
    owner = model.get_submodule(site.owner)
    if site.holder == site.owner:
        return owner
    name = site.holder.rpartition(".")[2]
    if name not in owner._modules:
        owner.add_module(name, nn.Module().train(owner.training))
    return owner.get_submodule(name)
