"""How the factors of a site lie over processes: as its weight does, which each process holds a part of.

Tensor parallelism cuts a weight along its outputs (colwise) or its inputs (rowwise), FSDP2 cuts all of it for
the time between two calls. The factors of an adapter that is added to an FSDP2 model are whole in every
process, and small.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
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
from lora_fx.runtime import called_by_all

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
    """Where the parts of A and B lie.

    Attributes:
        mesh: The processes (a ``DeviceMesh``).
        a, b: Placements, one for each dimension of the mesh.
    """

    mesh: Any
    a: tuple[Any, ...]
    b: tuple[Any, ...]

    @property
    def slot(self) -> tuple[Any, ...]:
        """Placements of what has an element for each output feature: as B has them."""
        return self.b


def check_layouts(model: nn.Module, rows: tuple[PlannedSite, ...]) -> None:
    """Refuses sites whose weight lies so that no factors can lie beside it.

    Raises:
        ConfigError: With the first of them, in every process alike.
    """
    for row in rows:
        if is_sharded(weight_at(model, row.site.weight)):
            factor_layout(model, row)


def check_alike(model: nn.Module, rows: tuple[PlannedSite, ...], adapter: str) -> None:
    """Refuses an adapter that is not the same in all processes that hold parts of the model.

    Nothing is sent where no parameter is in parts, and else a few bytes.

    Args:
        model: The model with the adapter.
        rows: The adapter's sites.
        adapter: The adapter's name.

    Raises:
        ConfigError: If it is another one somewhere: in every process, with the first site that differs.
        ProcessError: If a process does not answer.
    """
    parts: list[Any] = [p for _, p in model.named_parameters() if is_sharded(p) and not p.is_meta]
    meshes = list(dict.fromkeys(p.device_mesh for p in parts))
    if not meshes:
        return
    called_by_all(parts, f"the adapter {adapter!r}")
    mine = {row.name: _digest(model, row, adapter) for row in rows}
    for mesh in meshes:
        for place in range(mesh.ndim):
            with answering(f"the adapter {adapter!r}"):
                several = _from_all(mine, mesh.get_group(place))
            _compare(several, adapter)


def _digest(model: nn.Module, row: PlannedSite, adapter: str) -> str:
    """What is equal in all processes at a site: shapes, and values that are whole."""
    found = hashlib.sha256(f"{row.kind} {row.scale} {row.dropout}".encode())
    for name, value in factors_of(model, row, adapter).values.items():
        found.update(f"{name} {tuple(value.shape)}".encode())
        own: Any = value.detach()
        if not is_sharded(own) or all(one.is_replicate() for one in own.placements):
            found.update(
                torch_private.local_tensor(own)
                .contiguous()
                .cpu()
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
    return found.hexdigest()


def _from_all(mine: dict[str, str], group: Any) -> list[dict[str, str]]:
    """Gather a dict from each process of a group; digests alone are sent where they agree."""
    import torch.distributed as dist

    several: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(several, hashlib.sha256(repr(mine).encode()).hexdigest(), group)
    if len(set(several)) == 1:
        return [mine]
    dist.all_gather_object(several, mine, group)
    return several


def _compare(several: list[dict[str, str]], adapter: str) -> None:
    first = several[0]
    for place, other in enumerate(several):
        names = (*first, *(name for name in other if name not in first))
        for name in names:
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"{name}: the adapter {adapter!r} is another one in process {place} than in process 0 of "
                    "those that hold parts of the model: give every process the same configuration, and "
                    "load the same folder"
                )


def check_can_add(model: nn.Module, adapter: str, *, beside_weights: bool) -> None:
    """Refuses an adapter that would have parameters which nothing keeps equal in all processes.

    Args:
        model: A rewritten model.
        adapter: The adapter's name.
        beside_weights: Whether it has only what lies beside the weights that it adapts: that is whole in each
            process of an FSDP2 model, and gets the mean of all gradients.

    Raises:
        ConfigError: If FSDP2 or ZeRO shards the model, and it is another one.
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
    """Refuses to adapt what FSDP2 has left out of a model that it shards.

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
    """Where the factors of a site lie whose weight is a ``DTensor``.

    Args:
        model: The model.
        row: The site.

    Raises:
        ConfigError: If they cannot follow the weight.
    """
    from torch.distributed.tensor import Replicate, Shard

    weight: Any = weight_at(model, row.site.weight)
    if not kind_of(row).in_parts:
        right = " or ".join(one.name for one in kinds() if one.in_parts)
        raise ConfigError(
            f"{row.name}: its weight is cut over {weight.device_mesh.size()} processes, and the kind "
            f"{row.kind!r} does not say that its branch is right over parts (in_parts): use {right} "
            "here; or shard the rewritten model, which FSDP2 alone can"
        )
    mesh, between = weight.device_mesh, _between_calls(model, row.site.owner)
    out, inner = (0, 1) if row.site.layout == "out_in" else (1, 0)
    a: list[Any] = []
    b: list[Any] = []
    for place, placement in enumerate(weight.placements):
        if placement.is_replicate() or place in between:
            a.append(Replicate())
            b.append(Replicate())
            continue
        _check_cut(row, weight, mesh.size(place), placement)
        # Where FSDP has cut a part once more, the part itself is cut as parallelize_module has left it.
        a.append(Shard(1) if placement.dim % 2 == inner else Replicate())
        b.append(Shard(0) if placement.dim % 2 == out else Replicate())
    return FactorLayout(mesh, tuple(a), tuple(b))


def _check_cut(row: PlannedSite, weight: torch.Tensor, size: int, placement: Any) -> None:
    """Refuses a way of cutting a weight that no branch can follow."""
    site, why = row.site, ""
    plain = site.family == "linear" and len(site.weight_shape) == 2
    if not plain or site.rows is not None or site.view is not None or site.part_of or row.tied:
        why = "only a linear layer that applies the whole of its weight can be adapted so"
    elif not placement.is_shard():
        why = f"in parts that are interleaved ({placement})"
    elif weight.shape[placement.dim] % size:
        why = f"its {weight.shape[placement.dim]} elements there do not divide by {size}"
    if why:
        raise ConfigError(
            f"{site.name}: its weight {list(weight.shape)} is cut over {size} processes along dimension "
            f"{getattr(placement, 'dim', '?')}, and {why}; or leave it out with exclude_modules"
        )


def _between_calls(model: nn.Module, owner: str) -> tuple[int, ...]:
    """The dimensions of a weight's mesh over which FSDP2 cuts it between two calls."""
    layer, above = module_at(model, owner), owner
    while True:
        module = module_at(model, above)
        if is_unit(module):
            groups = torch_private.fsdp_groups(module)
            managed = (held for group in groups for held in group.fsdp_params)
            if any(torch_private.fsdp_owner(held).module is layer for held in managed):
                # In the mesh of a parameter those dimensions come first.
                return tuple(range(groups[0].mesh_info.mesh.ndim))
        if not above:
            return ()
        above = above.rpartition(".")[0]
