"""The placements of a site's factors over processes. They follow the placements of its weight.

Tensor parallelism splits a weight along its outputs (colwise) or its inputs (rowwise), and the factors are
split to match. FSDP2 splits all weights between calls. If an adapter is added to an FSDP2 model, its factors
are not split: they are small, and every process has all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.digests import add_values
from lora_fx.errors import ConfigError
from lora_fx.ir import PlannedSite
from lora_fx.kinds import kind_of, kinds
from lora_fx.passes.graph import is_owned, is_partitioned, is_unit
from lora_fx.passes.parameters.factors import factors_of
from lora_fx.passes.parameters.replacements import (
    answering,
    is_sharded,
    module_at,
    weight_at,
)
from lora_fx.runtime.modules import called_by_all

__all__ = [
    "FactorLayout",
    "check_alike",
    "check_can_add",
    "check_layouts",
    "check_sharded_alike",
    "factor_layout",
]


@dataclasses.dataclass(frozen=True, slots=True)
class FactorLayout:
    """The placements of A and B.

    Attributes:
        mesh: The processes (a ``DeviceMesh``).
        a, b: Placements, one for each dimension of the mesh.
    """

    mesh: Any
    a: tuple[Any, ...]
    b: tuple[Any, ...]

    @property
    def slot(self) -> tuple[Any, ...]:
        """Placements of a vector with an element for each output feature. They are those of B."""
        return self.b


def check_layouts(model: nn.Module, rows: tuple[PlannedSite, ...]) -> None:
    """Raise for sites whose weight is split over processes in a way that its factors cannot be.

    Raises:
        ConfigError: With the first such site. All processes raise the same error.
    """
    for row in rows:
        if is_sharded(weight_at(model, row.site.weight)):
            factor_layout(model, row)


def check_alike(model: nn.Module, rows: tuple[PlannedSite, ...], adapter: str) -> None:
    """Raise if an adapter is not the same in all processes that hold parts of the model.

    Nothing is sent if no parameter is in parts, and only a few bytes otherwise.

    Args:
        model: The model with the adapter.
        rows: The adapter's sites.
        adapter: The adapter's name.

    Raises:
        ConfigError: With the first site that differs. All processes raise the same error.
        ProcessError: If a process does not answer.
    """
    parts: list[Any] = [p for _, p in model.named_parameters() if is_sharded(p) and not p.is_meta]
    meshes = list(dict.fromkeys(p.device_mesh for p in parts))
    if not meshes:
        return
    called_by_all(parts, f"the adapter {adapter!r}")
    digests = {row.name: _digest(model, row, adapter) for row in rows}
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            with answering(f"the adapter {adapter!r}"):
                gathered = _from_all(digests, mesh.get_group(dimension))
            _compare(gathered, adapter)


def _digest(model: nn.Module, row: PlannedSite, adapter: str) -> str:
    """Return a digest of a site's shapes and whole values, which must be equal in all processes."""
    digest = hashlib.sha256(f"{row.kind} {row.scale} {row.dropout}".encode())
    for name, value in factors_of(model, row, adapter).values.items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        values: Any = value.detach()
        if not is_sharded(values) or all(
            placement.is_replicate() for placement in values.placements
        ):
            add_values(digest, torch_private.local_tensor(values))
    return digest.hexdigest()


def _from_all(digests: dict[str, str], group: Any) -> list[dict[str, str]]:
    """Gather a dict from each process of a group. If all agree, only digests are sent."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, hashlib.sha256(repr(digests).encode()).hexdigest(), group)
    if len(set(gathered)) == 1:
        return [digests]
    dist.all_gather_object(gathered, digests, group)
    return gathered


def _compare(gathered: list[dict[str, str]], adapter: str) -> None:
    first = gathered[0]
    for index, other in enumerate(gathered):
        names = (*first, *(name for name in other if name not in first))
        for name in names:
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"{name}: the adapter {adapter!r} is another one in process {index} than in process 0 of "
                    "those that hold parts of the model: give every process the same configuration, and "
                    "load the same folder"
                )


def check_can_add(model: nn.Module, adapter: str, *, beside_weights: bool) -> None:
    """Raise if parameters of an adapter that is added to a sharded model could differ between processes.

    Args:
        model: A rewritten model.
        adapter: The adapter's name.
        beside_weights: True if the adapter has only parameters next to the weights that it adapts. In an
            FSDP2 model each process has all of these parameters, and they get the mean of all gradients.

    Raises:
        ConfigError: If FSDP2 or ZeRO shards the model, and the adapter has other parameters.
    """
    if is_owned(model) or (
        not beside_weights and any(is_unit(module) for module in model.modules())
    ):
        for name, parameter in model.named_parameters():
            if is_sharded(parameter) or is_partitioned(parameter):
                raise ConfigError(
                    f"{name} is sharded, and the adapter {adapter!r} would be whole in every process, where "
                    "nothing keeps it equal: add it before the model is sharded (fully_shard, "
                    "deepspeed.initialize, accelerate's prepare)"
                )


def check_sharded_alike(model: nn.Module, rows: tuple[PlannedSite, ...]) -> None:
    """Raise for sites that FSDP2 has left out of a model that it shards.

    Raises:
        ConfigError: With the first such site.
    """
    if not any(is_unit(module) for module in model.modules()):
        return
    for row in rows:
        if not is_sharded(weight_at(model, row.site.weight)):
            raise ConfigError(
                f"{row.name}: FSDP2 shards the model and not this layer, so that nothing would keep an "
                "adapter of it equal in all processes: call fully_shard on the model, too, or leave "
                "the layer out with exclude_modules"
            )


def factor_layout(model: nn.Module, row: PlannedSite) -> FactorLayout:
    """Return the placements of the factors of a site whose weight is a ``DTensor``.

    Args:
        model: The model.
        row: The site.

    Raises:
        ConfigError: If the factors cannot follow the weight.
    """
    from torch.distributed.tensor import Replicate, Shard

    weight: Any = weight_at(model, row.site.weight)
    if not kind_of(row).in_parts:
        names = " or ".join(kind.name for kind in kinds() if kind.in_parts)
        raise ConfigError(
            f"{row.name}: its weight is cut over {weight.device_mesh.size()} processes, and the kind "
            f"{row.kind!r} does not say that its branch is right over parts (in_parts): use {names} "
            "here; or shard the rewritten model, which FSDP2 alone can"
        )
    mesh, fsdp_dimensions = weight.device_mesh, _between_calls(model, row.site.owner)
    out, inner = (0, 1) if row.site.layout == "out_in" else (1, 0)
    a: list[Any] = []
    b: list[Any] = []
    for dimension, placement in enumerate(weight.placements):
        if placement.is_replicate() or dimension in fsdp_dimensions:
            a.append(Replicate())
            b.append(Replicate())
            continue
        _check_cut(row, weight, mesh.size(dimension), placement)
        # FSDP may have split this part further. The dimension of the placement is still the one that
        # parallelize_module has set.
        a.append(Shard(1) if placement.dim % 2 == inner else Replicate())
        b.append(Shard(0) if placement.dim % 2 == out else Replicate())
    return FactorLayout(mesh, tuple(a), tuple(b))


def _check_cut(row: PlannedSite, weight: torch.Tensor, size: int, placement: Any) -> None:
    """Raise if the factors of a site cannot be split over processes as its weight is."""
    site, reason = row.site, ""
    is_matrix = site.family == "linear" and len(site.weight_shape) == 2
    if not is_matrix or site.rows is not None or site.view is not None or site.part_of or row.tied:
        reason = "only a linear layer that applies the whole of its weight can be adapted so"
    elif not placement.is_shard():
        reason = f"in parts that are interleaved ({placement})"
    elif weight.shape[placement.dim] % size:
        reason = f"its {weight.shape[placement.dim]} elements there do not divide by {size}"
    if reason:
        raise ConfigError(
            f"{site.name}: its weight {list(weight.shape)} is cut over {size} processes along dimension "
            f"{getattr(placement, 'dim', '?')}, and {reason}; or leave it out with exclude_modules"
        )


def _between_calls(model: nn.Module, owner: str) -> tuple[int, ...]:
    """Return the dimensions of a weight's mesh over which FSDP2 splits it between calls."""
    layer, fqn = module_at(model, owner), owner
    while True:
        module = module_at(model, fqn)
        if is_unit(module):
            groups = torch_private.fsdp_groups(module)
            managed = (parameter for group in groups for parameter in group.fsdp_params)
            if any(torch_private.fsdp_owner(parameter).module is layer for parameter in managed):
                # In the mesh of a parameter the dimensions of FSDP come first.
                return tuple(range(groups[0].mesh_info.mesh.ndim))
        if not fqn:
            return ()
        fqn = fqn.rpartition(".")[0]
