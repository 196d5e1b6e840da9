"""Gives every planned site its factors: parameters beside the weight that they adapt.

The model of the capture is the pipeline's own. The names of its base parameters do not change.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

from torch import nn

from lora_fx.config import LoraConfig
from lora_fx.ops import AdapterFactors, Holder
from lora_fx.passes._factors import factor_names
from lora_fx.passes._starts import initial_bias, initial_factors, initial_magnitude
from lora_fx.passes.patterns import pattern_of
from lora_fx.types import Capture, PassResult, Plan, PlannedSite, Site

__all__ = ["AddFactors"]

_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class AddFactors:
    """The pass.

    Attributes:
        plan: Which sites.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "add-factors"
    plan: Plan
    adapter: str = "default"

    def __call__(self, capture: Capture) -> PassResult:
        """Adds what is not there yet."""
        rows = [row for row in self.plan.sites if not _there(capture.model, row, self.adapter)]
        # Those that are tied to the factors of another site come after that one.
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            if row.tied:
                _tie_factors(capture.model, row, self.plan, self.adapter)
            else:
                _add_factors(capture.model, row, self.plan.config, self.adapter)
        if alone := [row.name for row in rows if row.lora_bias and row.site.bias is None]:
            _log.warning(
                "no merge can fold the bias on B (lora_bias) of these, which have none of their own: %s",
                ", ".join(alone),
            )
        return PassResult(capture, bool(rows))


def _there(model: nn.Module, row: PlannedSite, adapter: str) -> bool:
    try:
        model.get_parameter(f"{row.site.holder}.{factor_names(row).a}.{adapter}".lstrip("."))
    except AttributeError:
        return False
    return True


def _add_factors(model: nn.Module, row: PlannedSite, config: LoraConfig, adapter: str) -> None:
    site, names = row.site, factor_names(row)
    shapes = pattern_of(site).factors(site, row.rank)
    weight = model.get_parameter(site.weight)
    a, b = initial_factors(site, shapes, weight, config)
    for name, value in ((names.a, a), (names.b, b)):
        _factors(_holder(model, site), name).add(adapter, value)
    _add_variants(model, row, config, adapter)


def _tie_factors(model: nn.Module, row: PlannedSite, plan: Plan, adapter: str) -> None:
    """Registers the factors of an embedding a second time, at the head that shares its weight."""
    source = next(one.site for one in plan.sites if one.name == row.tied)
    names = factor_names(row)
    for name in (names.a, names.b):
        value = model.get_submodule(source.holder).get_submodule(name).get_parameter(adapter)
        _factors(_holder(model, row.site), name).add(adapter, value)
    _add_variants(model, row, plan.config, adapter)


def _add_variants(model: nn.Module, row: PlannedSite, config: LoraConfig, adapter: str) -> None:
    """The magnitude and the bias of B, where the site has them: its own also where A and B are not."""
    names, holder = factor_names(row), _holder(model, row.site)
    a, b = (holder.get_submodule(name).get_parameter(adapter) for name in (names.a, names.b))
    weight = model.get_parameter(row.site.weight)
    if names.magnitude:
        value = initial_magnitude(row, weight, a, b)
        _factors(holder, names.magnitude).add(adapter, value)
    if names.bias:
        _factors(holder, names.bias).add(adapter, initial_bias(row, weight, config))


def _factors(holder: nn.Module, name: str) -> AdapterFactors:
    if name not in holder._modules:
        holder.add_module(name, AdapterFactors())
    factors = holder.get_submodule(name)
    assert isinstance(factors, AdapterFactors)
    factors.train(holder.training)
    return factors


def _holder(model: nn.Module, site: Site) -> nn.Module:
    owner = model.get_submodule(site.owner)
    if site.holder == site.owner:
        return owner
    name = site.holder.rpartition(".")[2]
    if name not in owner._modules:
        owner.add_module(name, Holder().train(owner.training))
    return owner.get_submodule(name)
