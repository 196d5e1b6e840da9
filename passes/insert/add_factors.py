"""Pass that gives every planned site its factors: parameters next to the weight that they adapt.

The model of the capture is a copy that belongs to the pipeline. The names of its base parameters do not
change. Some initializations (:mod:`lora_fx.passes.insert.starts`) change the base weight. The site then gets
a new weight parameter, so that the user's model is not changed. Modules that are tied to this weight keep
the old parameter.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

import torch
from torch import nn

from lora_fx.config import LoraConfig, changes_base, needs_data
from lora_fx.ir import Capture, Kind, Pass, PassResult, Plan, PlannedSite, Site
from lora_fx.kinds import Slot, Starting, kind_of
from lora_fx.passes.graph import partition_of
from lora_fx.passes.insert.starts import Start, initial_start, site_generator
from lora_fx.passes.parameters import (
    DROPOUT,
    adapter_dtype,
    base_weight,
    detached,
    distributed,
    distributed_as,
    factor_layout,
    factor_names,
    gathered,
    is_partitioned,
    is_sharded,
    module_at,
    weight_at,
)
from lora_fx.runtime.modules import (
    AdapterDropouts,
    AdapterFactors,
    AdapterState,
    Holder,
    KeptTensors,
)

__all__ = [
    "AddFactors",
    "computed_starts",
    "drop_site",
    "place_slots",
    "place_start",
    "slot_start",
    "start_factors",
]


_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class AddFactors(Pass):
    """Pass that gives the sites of the plan the parameters of an adapter.

    Attributes:
        adapter: The adapter's name.
        loaded: True if a checkpoint overwrites the factors next, so that no start is computed from a weight.
    """

    name: ClassVar[str] = "add-factors"
    kind: ClassVar[Kind] = "in place"
    needs: ClassVar[str] = "plan"
    adapter: str = "default"
    loaded: bool = False

    def __call__(self, capture: Capture) -> PassResult:
        """Add the factors, slots and dropout of each planned site that does not have them yet."""
        plan = capture.plan
        assert plan is not None
        rows = [row for row in plan.sites if not _there(capture.model, row, self.adapter)]
        # Sites that are tied to the factors of another site come after that site.
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            if row.tied:
                _tie_factors(capture.model, row, plan, self.adapter)
            else:
                self._add_factors(capture.model, row, plan.config)
            _add_dropout(capture.model, row, self.adapter)
        alone: dict[str, list[str]] = {}
        for row in rows:
            kind = kind_of(row)
            if row.site.bias is None and any(slot.scaled for slot in kind.slots(row.site)):
                alone.setdefault(kind.field, []).append(row.name)
        for setting, names in alone.items():
            _log.warning(
                "no merge can fold the bias on B (%s) of these, which have none of their own: %s",
                setting,
                ", ".join(names),
            )
        return PassResult(capture, bool(rows))

    def _add_factors(self, model: nn.Module, row: PlannedSite, config: LoraConfig) -> None:
        kind, start = kind_of(row), config.init_lora_weights
        if kind.low_rank:
            # If several sites are parts of one weight, each of them starts from the weight that the
            # site before it has left.
            reads = changes_base(start) and not needs_data(start)
            reads = reads or kind.new_base or (kind.starts_from_weight and not self.loaded)
            weight = (
                gathered(base_weight(model, row.site)) if reads else _base_like(model, row.site)
            )
            begun = initial_start(row, weight, config, loaded=self.loaded)
            place_start(model, row, self.adapter, begun)
        place_slots(model, row, self.adapter, config)


def _there(model: nn.Module, row: PlannedSite, adapter: str) -> bool:
    site = row.site
    above = module_at(model, site.owner)
    name = site.holder.rpartition(".")[2]
    holder = above if site.holder == site.owner else above._modules.get(name)
    names = factor_names(row).present or ((DROPOUT,) if row.dropout else ())
    if not names:
        return True
    factors = None if holder is None else holder._modules.get(names[0])
    if isinstance(factors, AdapterDropouts):
        return adapter in factors._modules
    return factors is not None and adapter in factors._parameters


def _tie_factors(model: nn.Module, row: PlannedSite, plan: Plan, adapter: str) -> None:
    """Register the factors of an embedding a second time, at the head that shares its weight."""
    source = next(other.site for other in plan.sites if other.name == row.tied)
    names = factor_names(row)
    for name in (names.a, names.b):
        value = model.get_submodule(source.holder).get_submodule(name).get_parameter(adapter)
        _factors_module(model, row.site, name).add(adapter, value)
    place_slots(model, row, adapter, plan.config)


def _add_dropout(model: nn.Module, row: PlannedSite, adapter: str) -> None:
    if not row.dropout:
        return
    holder = _holder(model, row.site)
    dropouts = holder._modules.get(DROPOUT)
    if not isinstance(dropouts, AdapterDropouts):
        dropouts = AdapterDropouts().train(holder.training)
        holder.add_module(DROPOUT, dropouts)
    dropouts.add(adapter, row.dropout)


def slot_start(
    row: PlannedSite,
    slot: Slot,
    weight: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    config: LoraConfig,
) -> torch.Tensor:
    """Return the initial value of a slot, in the shape and dtype in which it is stored.

    Args:
        row: The site.
        slot: The slot: a tensor that the site's kind has besides A and B.
        weight: The weight of the site.
        pair: A and B of the site as they are stored; None for a kind without them.
        config: The configuration.
    """
    dtype = adapter_dtype(weight)
    if weight.device.type == "meta":
        return torch.empty(slot.sized(row.rank), dtype=dtype, device="meta")
    a, b = pair or (None, None)
    starting = Starting(row, weight, a, b, config, lambda name: site_generator(name, config))
    start = kind_of(row).start(slot, starting)
    return start.reshape(slot.sized(row.rank)).to(weight.device, dtype)


_START_A: Final = "lora_A_start"
"""Name of the module with the initial A, if ``s·BA`` was subtracted from the base. Saving needs it."""

_START_B: Final = "lora_B_start"
"""Name of the module with the initial B, in the same case."""


def place_start(model: nn.Module, row: PlannedSite, adapter: str, start: Start) -> None:
    """Set the factors of a site to their initial values. Former factors of the adapter are replaced."""
    names = factor_names(row)
    start = _shard_start(model, row, start)
    fixed = kind_of(row).frozen
    for letter, name, value in (("a", names.a, start.a), ("b", names.b, start.b)):
        _put(model, row.site, name, adapter, value, trained=letter not in fixed)
    if start.subtracted:
        for name, value in ((_START_A, start.a), (_START_B, start.b)):
            # Copies, because training writes into the factors.
            kept = nn.Parameter(value.clone(), requires_grad=False)
            _factors_module(model, row.site, name, KeptTensors).add(adapter, kept)
    if start.weight is not None:
        owner = model.get_submodule(row.site.owner)
        before = owner._parameters[row.site.parameter]
        assert before is not None
        if is_partitioned(before):
            frozen = partition_of(start.weight, before)
        else:
            frozen = nn.Parameter(start.weight, requires_grad=False)
            frozen.__dict__.update(before.__dict__)
        owner._parameters[row.site.parameter] = frozen


def _shard_start(model: nn.Module, row: PlannedSite, start: Start) -> Start:
    """Shard the initial values of a site, if its weight is sharded."""
    weight = weight_at(model, row.site.weight)
    if not is_sharded(weight):
        return start
    layout = factor_layout(model, row)
    changed = start.weight
    return dataclasses.replace(
        start,
        a=distributed(start.a, layout.mesh, layout.a),
        b=distributed(start.b, layout.mesh, layout.b),
        weight=None if changed is None else distributed_as(changed, weight),
    )


def place_slots(model: nn.Module, row: PlannedSite, adapter: str, config: LoraConfig) -> None:
    """Set the slots of a site (the tensors besides A and B) to their initial values.

    A tied site shares A and B with another site, but not the slots.
    """
    kind, names = kind_of(row), factor_names(row)
    if not names.slots:
        return
    weight, pair = base_weight(model, row.site), None
    layout = factor_layout(model, row) if is_sharded(weight) else None
    if kind.low_rank:
        holder = module_at(model, row.site.holder)
        a, b = (holder.get_submodule(name).get_parameter(adapter) for name in names.pair)
        pair = gathered(a), gathered(b)
    weight = gathered(weight)
    for slot in kind.slots(row.site):
        value = slot_start(row, slot, weight, pair, config)
        if layout is not None:
            value = distributed(value, layout.mesh, layout.slot)
        if slot.trained:
            _put(model, row.site, slot.name, adapter, value)
        else:
            _factors_module(model, row.site, slot.name, AdapterState).add(adapter, value)


def _put(
    model: nn.Module,
    site: Site,
    name: str,
    adapter: str,
    value: torch.Tensor,
    *,
    trained: bool = True,
) -> None:
    """Set a parameter of an adapter at a site.

    It is frozen if `trained` is False, or if the parameter that it replaces was frozen. The parameters of an
    inactive adapter are frozen.
    """
    factors = _factors_module(model, site, name)
    former = factors._parameters.get(adapter)
    trained = trained and (former is None or former.requires_grad)
    factors.add(adapter, nn.Parameter(value, requires_grad=trained))


def computed_starts(
    model: nn.Module,
    rows: Iterable[PlannedSite],
    make: Callable[[PlannedSite, torch.Tensor], Start],
) -> list[tuple[PlannedSite, Start]]:
    """Compute the initial values of sites from their weights, and return each site with its start.

    The model is not changed yet, so that an error leaves it intact.

    Args:
        model: A rewritten model.
        rows: The sites.
        make: Returns the start of a site from its weight. If several sites are parts of one weight, each gets
            the weight that the start of the part before has left.
    """
    now: dict[str, torch.Tensor] = {}
    starts: list[tuple[PlannedSite, Start]] = []
    for row in rows:
        name = row.site.weight
        start = make(row, now.get(name, gathered(base_weight(model, row.site))))
        if start.weight is not None:
            now[name] = start.weight
        starts.append((row, dataclasses.replace(start, weight=None)))
    return [
        (row, dataclasses.replace(start, weight=now.get(row.site.weight))) for row, start in starts
    ]


def start_factors(
    model: nn.Module, row: PlannedSite, adapter: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the initial A and B whose product was subtracted from the weight; None without a subtraction."""
    holder = model.get_submodule(row.site.holder)
    kept = holder._modules.get(_START_A)
    if kept is None or adapter not in kept._parameters:
        return None
    a, b = (holder.get_submodule(name).get_parameter(adapter) for name in (_START_A, _START_B))
    return detached(a), detached(b)


def drop_site(model: nn.Module, row: PlannedSite, adapter: str) -> None:
    """Remove the parameters of an adapter at one site."""
    holder = model.get_submodule(row.site.holder)
    for name in (*factor_names(row).present, _START_A, _START_B):
        factors = holder._modules.get(name)
        if isinstance(factors, AdapterFactors):
            factors._parameters.pop(adapter, None)
            factors._buffers.pop(adapter, None)
            if not factors._parameters and not factors._buffers:
                del holder._modules[name]
    dropouts = holder._modules.get(DROPOUT)
    if isinstance(dropouts, AdapterDropouts):
        dropouts._modules.pop(adapter, None)
        if not dropouts._modules:
            del holder._modules[DROPOUT]
    if isinstance(holder, Holder) and not holder._modules:
        del model.get_submodule(row.site.owner)._modules[row.site.holder.rpartition(".")[2]]


def _factors_module(
    model: nn.Module, site: Site, name: str, cls: type[AdapterFactors] = AdapterFactors
) -> AdapterFactors:
    """Return the module with all adapters' tensors of one name at a site, and create it if needed."""
    holder = _holder(model, site)
    if name not in holder._modules:
        holder.add_module(name, cls())
    factors = holder.get_submodule(name)
    assert isinstance(factors, AdapterFactors)
    factors.train(holder.training)
    return factors


def _holder(model: nn.Module, site: Site) -> nn.Module:
    owner = module_at(model, site.owner)
    if site.holder == site.owner:
        return owner
    name = site.holder.rpartition(".")[2]
    if name not in owner._modules:
        owner.add_module(name, Holder().train(owner.training))
    return owner.get_submodule(name)


def _base_like(model: nn.Module, site: Site) -> torch.Tensor:
    """Return a tensor with dtype, shape and device of :func:`base_weight`. Its values have no meaning.

    It is for code that does not read values, so nothing is dequantized or gathered.
    """
    weight = weight_at(model, site.weight)
    if site.quantized is None and not is_partitioned(weight):
        return weight.detach()
    dtype = weight.dtype if site.quantized is None else site.quantized.dtype
    return torch.empty((), dtype=dtype, device=weight.device).expand(site.weight_shape)
