"""Where the parameters of a planned site are, and its weight as matrices [n, out, in].

A linear weight is one matrix, a weight of experts one for each expert. A convolution with g groups is g
matrices [out/g, in/g · kernel], of which each gets r/g of the rank: what its A and B compute is their
product (see :mod:`lora_fx.passes.patterns.conv`).

Trained rows of an embedding are next to it, under PEFT's names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.ir import Factors, PlannedSite, PlannedTokens, Site, join
from lora_fx.kinds import kind_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime import AdapterDropouts, AdapterFactors, Holder, KeptTensors, ops

__all__ = [
    "DROPOUT",
    "FactorNames",
    "SiteFactors",
    "adapter_dtype",
    "adapter_parameters",
    "add_tokens",
    "as_factors",
    "as_matrices",
    "drop_factors",
    "factor_names",
    "factors_of",
    "indices_name",
    "matrix_shape",
    "part_of",
    "replaced",
    "rows_name",
    "rows_of",
    "tokens_of",
    "wide",
]


DROPOUT: Final = "lora_dropout"
"""The attribute of a site's holder that has the dropout of each adapter, where it has any."""


@dataclasses.dataclass(frozen=True, slots=True)
class FactorNames:
    """The attributes of a site's holder that have what it trains.

    Attributes:
        a, b: The factors; empty where the kind has none.
        slots: What the kind trains besides them.
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
        """The names that are not None."""
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
        """The tensors that are not None, in the order of :attr:`FactorNames.present`."""
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
    """Return the parameters of :func:`factor_names`.

    Raises:
        CaptureError: If FSDP1 has them in shards.
    """
    holder, names = model.get_submodule(row.site.holder), factor_names(row)
    factors = {name: holder.get_submodule(name).get_parameter(adapter) for name in names.present}
    for name in filter(None, names.pair):
        if torch_private.is_flat(factors[name]) and factors[name].dim() < 2:
            raise CaptureError(
                f"{join(row.site.holder, name, adapter)} is in shards of FSDP1: do this in "
                "FullyShardedDataParallel.summon_full_params(model), or save what the state_dict() of the "
                "wrapped model gives"
            )
    return SiteFactors(names, factors)


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
            if isinstance(child, AdapterDropouts):
                child._modules.pop(adapter, None)
            if isinstance(child, AdapterDropouts | Holder) and not child._modules:
                del module._modules[name]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype in which starts are computed: fp32, or fp64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def matrix_shape(site: Site) -> tuple[int, int, int]:
    """How many matrices a weight is, and their shape: (n, out, in)."""
    if site.family == "conv":
        kernel = math.prod(site.weight_shape[2:])
        groups = site.groups
        return groups, site.out_features // groups, site.in_features // groups * kernel
    return site.experts or 1, site.out_features, site.in_features


def part_of(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """What of a weight is the site's, as it is applied: a view where the weight can be viewed so."""
    return rows_of(site, site.applied(weight))


def rows_of(site: Site, applied: torch.Tensor) -> torch.Tensor:
    """The rows that are the site's of a weight in the shape in which it is applied."""
    if site.rows is None:
        return applied
    return applied.narrow(site.axis, site.rows[0], site.rows[1] - site.rows[0])


def as_matrices(site: Site, part: torch.Tensor) -> torch.Tensor:
    """Brings :func:`part_of` a weight into the form [n, out, in]."""
    count, out, inner = matrix_shape(site)
    if site.family != "conv":
        return (part if site.layout == "out_in" else part.mT).reshape(count, out, inner)
    if site.layout == "out_in":
        return part.reshape(count, out, inner)
    # A transposed convolution stores [in, out/g, *k].
    apart = part.reshape(count, site.in_features // count, out, -1)
    return apart.transpose(1, 2).reshape(count, out, inner)


def as_factors(
    shapes: Factors, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The site's A and B of [n, r/g, in] and [n, out, r/g]."""
    return a.reshape(shapes.a).contiguous(), b.reshape(shapes.b).contiguous()


def replaced(site: Site, weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A weight as a new tensor, with other values of what :func:`part_of` gives."""
    changed = site.applied(weight.detach()).clone(memory_format=torch.contiguous_format)
    rows_of(site, changed).copy_(part)
    return site.stored(changed).contiguous()


_HOLDER = "token_adapter"
_ROWS = "trainable_tokens_delta"
_INDICES = "token_indices"


def rows_name(row: PlannedTokens, adapter: str) -> str:
    """FQN of the trained rows, [n, width]."""
    return join(row.site.holder, _HOLDER, _ROWS, adapter)


def indices_name(row: PlannedTokens, adapter: str) -> str:
    """FQN of what says which rows these are.

    For a lookup it is [vocabulary]: the place of each token among the trained ones, -1 for any other.
    For a product it is [n]: the tokens.
    """
    return join(row.site.holder, _HOLDER, _INDICES, adapter)


def tokens_of(model: nn.Module, row: PlannedTokens, adapter: str) -> nn.Parameter:
    """The trained rows, [n, width]: what stands in place of those of the weight."""
    return model.get_parameter(rows_name(row, adapter))


def add_tokens(model: nn.Module, row: PlannedTokens, adapter: str, rows: torch.Tensor) -> None:
    """Puts rows, and which ones they are, beside a weight.

    Args:
        model: The pipeline's own.
        row: Which rows of what.
        adapter: The adapter's name.
        rows: [n, width]; a parameter is taken as it is.
    """
    indices = torch.tensor(row.indices, device=rows.device)
    if row.lookup:
        places = torch.full((row.site.in_features,), -1, device=rows.device)
        places[indices] = torch.arange(len(indices), device=rows.device)
        indices = places
    holder = _made(model, join(row.site.holder, _HOLDER), Holder)
    factors = _made(model, rows_name(row, adapter).rpartition(".")[0], AdapterFactors)
    kept = _made(model, indices_name(row, adapter).rpartition(".")[0], ops.KeptIndices)
    assert isinstance(factors, AdapterFactors)
    assert isinstance(kept, ops.KeptIndices)
    factors.add(adapter, rows)
    kept.add(adapter, indices)
    holder.train(model.get_submodule(row.site.owner).training)


def _made(model: nn.Module, fqn: str, kind: type[nn.Module]) -> nn.Module:
    """The module of a name; it is put there, and holders on the way to it, if there is none."""
    parent_name, _, leaf = fqn.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        parent = _made(model, parent_name, Holder)
    if leaf not in parent._modules:
        parent.add_module(leaf, kind())
    return parent.get_submodule(leaf)
