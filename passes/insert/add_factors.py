"""Gives every planned site its factors: parameters beside the weight that they adapt.

The model of the capture is the pipeline's own. The names of its base parameters do not change. Some
initializations (:mod:`lora_fx.passes.insert.starts`) change the base: the weight of the site is then a new
parameter, and the one that the argument of the rewrite has is not written.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

from torch import nn

from lora_fx.config import LoraConfig, changes_base, needs_data
from lora_fx.ir import Capture, Kind, Pass, PassResult, Plan, PlannedSite
from lora_fx.kinds import kind_of, kinds
from lora_fx.passes.insert.place_starts import factors_module, place_slots, place_start
from lora_fx.passes.insert.starts import initial_start
from lora_fx.passes.parameters import base_like, base_weight, factor_names, module_at

__all__ = ["AddFactors"]

_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class AddFactors(Pass):
    """The pass.

    Attributes:
        plan: Which sites; None for the plan of the capture.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "add-factors"
    kind: ClassVar[Kind] = "in place"
    plan: Plan | None = None
    adapter: str = "default"

    def requires(self, capture: Capture) -> str | None:
        """A plan has to be there."""
        return "nothing is planned" if self.plan is None and capture.plan is None else None

    def __call__(self, capture: Capture) -> PassResult:
        """Adds what is not there yet."""
        plan = self.plan or capture.plan
        assert plan is not None
        rows = [row for row in plan.sites if not _there(capture.model, row, self.adapter)]
        # Those that are tied to the factors of another site come after that one.
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            if row.tied:
                _tie_factors(capture.model, row, plan, self.adapter)
            else:
                _add_factors(capture.model, row, plan.config, self.adapter)
        for kind in kinds():
            here = [row for row in rows if row.kind == kind.name and row.site.bias is None]
            if alone := [
                row.name for row in here if any(one.scaled for one in kind.slots(row.site))
            ]:
                _log.warning(
                    "no merge can fold the bias on B (%s) of these, which have none of their own: %s",
                    kind.field or kind.name,
                    ", ".join(alone),
                )
        return PassResult(capture, bool(rows))


def _there(model: nn.Module, row: PlannedSite, adapter: str) -> bool:
    site = row.site
    above = module_at(model, site.owner)
    name = site.holder.rpartition(".")[2]
    holder = above if site.holder == site.owner else above._modules.get(name)
    factors = None if holder is None else holder._modules.get(factor_names(row).present[0])
    return factors is not None and adapter in factors._parameters


def _add_factors(model: nn.Module, row: PlannedSite, config: LoraConfig, adapter: str) -> None:
    if not kind_of(row).low_rank:
        place_slots(model, row, adapter, config)
        return
    # What the parts of one weight change adds up: each sees the weight as the one before it left it.
    reads = changes_base(config.init_lora_weights) and not needs_data(config.init_lora_weights)
    weight = (base_weight if reads else base_like)(model, row.site)
    place_start(model, row, adapter, initial_start(row, weight, config))
    place_slots(model, row, adapter, config)


def _tie_factors(model: nn.Module, row: PlannedSite, plan: Plan, adapter: str) -> None:
    """Registers the factors of an embedding a second time, at the head that shares its weight."""
    source = next(one.site for one in plan.sites if one.name == row.tied)
    names = factor_names(row)
    for name in (names.a, names.b):
        value = model.get_submodule(source.holder).get_submodule(name).get_parameter(adapter)
        factors_module(model, row.site, name).add(adapter, value)
    place_slots(model, row, adapter, plan.config)
