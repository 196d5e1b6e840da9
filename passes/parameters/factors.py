"""The parameters of a planned site, and its weight as matrices [n, out, in].

A linear weight is one matrix. A weight of experts has a matrix for each expert. A convolution with g groups
has g matrices [out/g, in/g · kernel], each with r/g of the rank. A and B of a group are matrices, too, and
their product is the change of that group (see :mod:`lora_fx.passes.patterns.conv`).

Trained rows of an embedding are stored next to it, under PEFT's names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.ir import Factors, PlannedSite, PlannedTokens, Site, join, record_of
from lora_fx.kinds import kind_of
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime.modules import (
    AdapterDropouts,
    AdapterFactors,
    Holder,
    KeptIndices,
    KeptTensors,
)

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
    "frozen_parameters",
    "indices_name",
    "matrix_shape",
    "other_rows",
    "part_of",
    "replaced",
    "rows_name",
    "rows_of",
    "shapes_of",
    "tokens_of",
    "wide",
]


DROPOUT: Final = "lora_dropout"
"""The attribute with the dropouts of a site's adapters, on the module that holds the site's factors."""


@dataclasses.dataclass(frozen=True, slots=True)
class FactorNames:
    """The attributes that have the factors and slots of a site, on the site's holder.

    Attributes:
        a, b: The attributes of the factors; empty for a kind without factors.
        slots: The attributes of the slots: the other tensors of the kind.
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
        """The names of the tensors that the kind has: A, B and slots, without empty names."""
        return tuple(name for name in (self.a, self.b, *self.slots) if name)


@dataclasses.dataclass(frozen=True, slots=True)
class SiteFactors:
    """The factors and slots of a site for one adapter, as stored.

    Attributes:
        names: The names of the factors and slots.
        values: The tensors by their names: parameters, and buffers for slots that are not trained.
    """

    names: FactorNames
    values: Mapping[str, torch.Tensor]

    @property
    def a(self) -> nn.Parameter:
        """The factor A. Only a kind that has factors has A."""
        return self._factor(self.names.a)

    @property
    def b(self) -> nn.Parameter:
        """The factor B. Only a kind that has factors has B."""
        return self._factor(self.names.b)

    def _factor(self, name: str) -> nn.Parameter:
        factor: nn.Parameter = self.values[name]  # type: ignore[assignment]
        return factor

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.a, self.b

    @property
    def slots(self) -> dict[str, torch.Tensor]:
        """The other tensors of the kind, by name."""
        return {name: self.values[name] for name in self.names.slots}

    @property
    def present(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order of :attr:`FactorNames.present`."""
        return tuple(self.values.values())


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the factors' dtype: that of the weight, or fp32 for a weight of less precision."""
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32


def factor_names(row: PlannedSite) -> FactorNames:
    """Return the names of A, B and the slots of the kind.

    A head whose weight is tied to an embedding has the embedding's factors in exchanged roles: the
    embedding's ``B``, transposed, is the head's A.
    """
    kind = kind_of(row)
    slots = tuple(slot.name for slot in kind.slots(row.site))
    if not kind.low_rank:
        return FactorNames("", "", slots)
    shapes = pattern_of(row.site).factors(row.site, row.rank)
    tied = ("lora_embedding_B", "lora_embedding_A")
    return FactorNames(*(tied if row.tied else (shapes.name_a, shapes.name_b)), slots)


def other_rows(model: nn.Module, row: PlannedSite) -> list[tuple[str, PlannedSite]]:
    """Return the other adapters whose factors the kind of a site reads, each with its own planned site.

    Raises:
        ConfigError: If the model lacks such an adapter, or the adapter is not plain LoRA at the site.
    """
    names = kind_of(row).reads
    record = record_of(model) if names else None
    rows: list[tuple[str, PlannedSite]] = []
    for name in names:
        if record is None or name not in record.adapters:
            has = ", ".join(map(repr, record.adapters)) if record is not None else "none"
            raise ConfigError(
                f"{row.name}: the adapter reads adapter {name!r}, and the model has {has}: load it first "
                "(lora_fx.load_adapter), then add this one (lora_fx.add_adapter)"
            )
        other = next((site for site in record.adapters[name].sites if site.name == row.name), None)
        if other is None or other.kind != "lora" or other.tied:
            state = (
                "has no factors there" if other is None else f"has the kind {other.kind!r} there"
            )
            raise ConfigError(
                f"{row.name}: the adapter reads adapter {name!r}, which {state}: it reads plain LoRA with "
                "the same sites only"
            )
        rows.append((name, other))
    return rows


def shapes_of(row: PlannedSite) -> Factors:
    """Return the shapes in which the kind of a site stores A and B."""
    return kind_of(row).factors(row.site, pattern_of(row.site).factors(row.site, row.rank))


def factors_of(model: nn.Module, row: PlannedSite, adapter: str) -> SiteFactors:
    """Return the factors and slots of an adapter at a site, under the names of :func:`factor_names`.

    Raises:
        CaptureError: If FSDP1 shards the factors.
    """
    holder, names = model.get_submodule(row.site.holder), factor_names(row)
    factors = {name: _tensor_of(holder.get_submodule(name), adapter) for name in names.present}
    for name in filter(None, names.pair):
        if torch_private.is_flat(factors[name]) and factors[name].dim() < 2:
            raise CaptureError(
                f"{join(row.site.holder, name, adapter)} is in shards of FSDP1: do this in "
                "FullyShardedDataParallel.summon_full_params(model), or save what the state_dict() of the "
                "wrapped model gives"
            )
    return SiteFactors(names, factors)


def _tensor_of(factors: nn.Module, adapter: str) -> torch.Tensor:
    buffer = factors._buffers.get(adapter)
    return factors.get_parameter(adapter) if buffer is None else buffer


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the factors of an adapter, its trained slots and its trained rows, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdapterFactors) and not isinstance(module, KeptTensors):
            parameter = module._parameters.get(adapter)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def frozen_parameters(model: nn.Module, adapter: str, rows: Iterable[PlannedSite]) -> set[int]:
    """Return the ids of the factors of an adapter that the kinds of its sites do not train."""
    frozen: set[int] = set()
    for row in rows:
        if letters := kind_of(row).frozen:
            pair = factors_of(model, row, adapter).pair
            frozen |= {
                id(value) for letter, value in zip("ab", pair, strict=True) if letter in letters
            }
    return frozen


def drop_factors(model: nn.Module, adapter: str) -> None:
    """Remove all parameters of an adapter from a model, and holders that become empty."""
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
    """Return a tensor in fp32, or unchanged if it is fp64. Initial values are computed in this dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def matrix_shape(site: Site) -> tuple[int, int, int]:
    """Return the number and the shape of a weight's matrices: (n, out, in)."""
    if site.family == "conv":
        kernel = math.prod(site.weight_shape[2:])
        groups = site.groups
        return groups, site.out_features // groups, site.in_features // groups * kernel
    return site.experts or 1, site.out_features, site.in_features


def part_of(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return the site's part of a weight, in its applied shape: a view if possible."""
    return rows_of(site, site.applied(weight))


def rows_of(site: Site, applied: torch.Tensor) -> torch.Tensor:
    """Return the site's rows of a weight that has its applied shape already."""
    if site.rows is None:
        return applied
    return applied.narrow(site.axis, site.rows[0], site.rows[1] - site.rows[0])


def as_matrices(site: Site, part: torch.Tensor) -> torch.Tensor:
    """Convert the result of :func:`part_of` to the shape [n, out, in]."""
    count, out, inner = matrix_shape(site)
    if site.family != "conv":
        return (part if site.layout == "out_in" else part.mT).reshape(count, out, inner)
    if site.layout == "out_in":
        return part.reshape(count, out, inner)
    # A transposed convolution stores [in, out/g, *k].
    split = part.reshape(count, site.in_features // count, out, -1)
    return split.transpose(1, 2).reshape(count, out, inner)


def as_factors(
    shapes: Factors, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reshape A [n, r/g, in] and B [n, out, r/g] to the shapes in which a site stores its factors."""
    return a.reshape(shapes.a).contiguous(), b.reshape(shapes.b).contiguous()


def replaced(site: Site, weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in which the site's part (see :func:`part_of`) has other values."""
    changed = site.applied(weight.detach()).clone(memory_format=torch.contiguous_format)
    rows_of(site, changed).copy_(part)
    return site.stored(changed).contiguous()


_HOLDER = "token_adapter"
_ROWS = "trainable_tokens_delta"
_INDICES = "token_indices"


def rows_name(row: PlannedTokens, adapter: str) -> str:
    """Return the FQN of the parameter with an adapter's trained rows of an embedding, [n, width]."""
    return join(row.site.holder, _HOLDER, _ROWS, adapter)


def indices_name(row: PlannedTokens, adapter: str) -> str:
    """Return the FQN of the buffer with the indices of an adapter's trained rows.

    For a lookup the buffer is [vocabulary]: the index of each token among the trained tokens, or -1. For a
    product the buffer is [n]: the trained tokens.
    """
    return join(row.site.holder, _HOLDER, _INDICES, adapter)


def tokens_of(model: nn.Module, row: PlannedTokens, adapter: str) -> nn.Parameter:
    """Return the parameter with an adapter's trained rows, [n, width], which replace rows of the weight."""
    return model.get_parameter(rows_name(row, adapter))


def add_tokens(model: nn.Module, row: PlannedTokens, adapter: str, rows: torch.Tensor) -> None:
    """Store trained rows, and their indices, next to a weight.

    Args:
        model: The model that the pipeline edits.
        row: The planned rows.
        adapter: The adapter's name.
        rows: The values, [n, width]. If it is a parameter, it is stored without a copy.
    """
    indices = torch.tensor(row.indices, device=rows.device)
    if row.lookup:
        positions = torch.full((row.site.in_features,), -1, device=rows.device)
        positions[indices] = torch.arange(len(indices), device=rows.device)
        indices = positions
    holder = _get_or_add(model, join(row.site.holder, _HOLDER), Holder)
    factors = _get_or_add(model, rows_name(row, adapter).rpartition(".")[0], AdapterFactors)
    kept_indices = _get_or_add(model, indices_name(row, adapter).rpartition(".")[0], KeptIndices)
    assert isinstance(factors, AdapterFactors)
    assert isinstance(kept_indices, KeptIndices)
    factors.add(adapter, rows)
    kept_indices.add(adapter, indices)
    holder.train(model.get_submodule(row.site.owner).training)


def _get_or_add(model: nn.Module, fqn: str, kind: type[nn.Module]) -> nn.Module:
    """Return the module of a name; insert it, and the holders above it, if it does not exist."""
    parent_name, _, leaf = fqn.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        parent = _get_or_add(model, parent_name, Holder)
    if leaf not in parent._modules:
        parent.add_module(leaf, kind())
    return parent.get_submodule(leaf)
