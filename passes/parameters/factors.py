"""Where the parameters of a planned site are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_fx.ir import PlannedSite
from lora_fx.kinds import kind_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime import AdapterFactors, Holder, KeptTensors

__all__ = [
    "FactorNames",
    "SiteFactors",
    "adapter_dtype",
    "adapter_parameters",
    "drop_factors",
    "factor_names",
    "factors_of",
]


@dataclasses.dataclass(frozen=True, slots=True)
class FactorNames:
    """The attributes of a site's holder that have what it trains.

    Attributes:
        a, b: The factors; empty where the kind has none.
        slots: What the kind trains beside them.
    """

    a: str
    b: str
    slots: tuple[str, ...] = ()

    @property
    def pair(self) -> tuple[str, str]:
        """A and B."""
        return self.a, self.b

    @property
    def present(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.a, self.b, *self.slots) if name)


@dataclasses.dataclass(frozen=True, slots=True)
class SiteFactors:
    """What a site trains for one adapter, as it is stored.

    Attributes:
        names: Where it is.
        values: By those names.
    """

    names: FactorNames
    values: Mapping[str, nn.Parameter]

    @property
    def a(self) -> nn.Parameter:
        """A, of a kind that has factors."""
        return self.values[self.names.a]

    @property
    def b(self) -> nn.Parameter:
        """B, likewise."""
        return self.values[self.names.b]

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.a, self.b

    @property
    def slots(self) -> dict[str, nn.Parameter]:
        """What the kind trains beside them, by name."""
        return {name: self.values[name] for name in self.names.slots}

    @property
    def present(self) -> tuple[nn.Parameter, ...]:
        """Those that there are, in the order of :attr:`FactorNames.present`."""
        return tuple(self.values.values())


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """The factors' dtype: that of the weight, or fp32 for a weight of less precision."""
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32


def factor_names(row: PlannedSite) -> FactorNames:
    """Where A, B and the slots of the kind are.

    A head whose weight is tied to an embedding has the embedding's factors, and they change places: what
    is ``B`` there is, transposed, its A.
    """
    kind = kind_of(row)
    slots = tuple(slot.name for slot in kind.slots(row.site))
    if not kind.low_rank:
        return FactorNames("", "", slots)
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    tied = ("lora_embedding_B", "lora_embedding_A")
    return FactorNames(*(tied if row.tied else (shapes.name_a, shapes.name_b)), slots)


def factors_of(model: nn.Module, row: PlannedSite, adapter: str) -> SiteFactors:
    """The parameters of :func:`factor_names`."""
    holder, names = model.get_submodule(row.site.holder), factor_names(row)
    present = names.present
    return SiteFactors(
        names, {name: holder.get_submodule(name).get_parameter(adapter) for name in present}
    )


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """The factors of an adapter, and whatever else it trains beside them, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdapterFactors) and not isinstance(module, KeptTensors):
            parameter = module._parameters.get(adapter)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def drop_factors(model: nn.Module, adapter: str) -> None:
    """Forgets all that an adapter has in a model; what holds nothing any more goes, too."""
    for module in reversed(list(model.modules())):
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterFactors):
                child._parameters.pop(adapter, None)
                child._buffers.pop(adapter, None)
                if not child._parameters and not child._buffers:
                    del module._modules[name]
            if isinstance(child, Holder) and not child._modules:
                del module._modules[name]
