"""The units of a model that FSDP2 shards: what they are, a copy without them, and the same units again.

FSDP2 makes a subclass of the class of each unit, and keeps its state in hooks. Neither can be copied. So a
copy has the modules' own classes, over the same shards, and is sharded as the original was once it is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.ir import join
from lora_fx.passes.graph.partitions import module_of_hook

__all__ = ["ShardedUnit", "copy_units", "is_unit", "shard_again", "units_of"]


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module as a unit."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


@dataclasses.dataclass(frozen=True)
class ShardedUnit:
    """One call of ``fully_shard``.

    Attributes:
        modules: FQNs of the modules that are a unit together.
        options: The arguments of the call.
        parts: How each parameter is cut, by FQN.
    """

    modules: tuple[str, ...]
    options: Mapping[str, Any]
    parts: Mapping[str, _Part]


@dataclasses.dataclass(frozen=True)
class _Part:
    """How FSDP2 cuts a parameter.

    Attributes:
        placement: Along which dimension.
        spec: How the parameter lies over the processes of tensor parallelism; None where it is whole there.
        size: Of what is cut: the parameter, or the part of it that this process holds there.
    """

    placement: Any
    spec: Any
    size: torch.Size

    def stand_in(self, like: torch.Tensor) -> nn.Parameter:
        """The parameter before it is cut, on the meta device."""
        local = torch.empty(self.size, dtype=like.dtype, device="meta")
        if self.spec is not None:
            from torch.distributed.tensor import DTensor

            local = DTensor.from_local(
                local,
                self.spec.mesh,
                self.spec.placements,
                run_check=False,
                shape=self.spec.shape,
                stride=self.spec.stride,
            )
        return nn.Parameter(local, requires_grad=like.requires_grad)


def units_of(model: nn.Module) -> tuple[ShardedUnit, ...]:
    """The units of a model, inner ones first, as ``fully_shard`` has to be called.

    Raises:
        CaptureError: If a unit is sharded in a way that cannot be repeated.
    """
    names = {module: name for name, module in model.named_modules()}
    states: dict[int, list[nn.Module]] = {}
    for module in names:
        if is_unit(module):
            states.setdefault(id(torch_private.fsdp_state(module)), []).append(module)
    groups = [
        group for several in states.values() for group in torch_private.fsdp_groups(several[0])
    ]
    found = []
    # Names go from the top down: a unit comes after all units that begin behind it.
    for several in reversed(states.values()):
        mine = torch_private.fsdp_groups(several[0])
        parts = {
            name: _Part(
                held.fsdp_placement, torch_private.fsdp_spec(held), torch_private.fsdp_size(held)
            )
            for group in mine
            for held in group.fsdp_params
            for name in _names(held, names)
        }
        fqns = tuple(names[module] for module in several)
        options = _options(several[0], fqns[0], mine or groups[:1])
        found.append(ShardedUnit(fqns, options, parts))
    return tuple(found)


def _names(held: Any, names: Mapping[nn.Module, str]) -> Iterator[str]:
    """The FQNs of a parameter, which several modules may have."""
    info = torch_private.fsdp_owner(held)
    yield join(names[info.module], info.param_name)
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        yield join(names[module], name)


def _options(unit: nn.Module, name: str, groups: list[Any]) -> dict[str, Any]:
    meshes = [group.mesh_info for group in groups]
    if not meshes or any(
        one.mesh != meshes[0].mesh or getattr(one, "spmd_mesh", None) is not None for one in meshes
    ):
        raise CaptureError(
            f"{name or 'the model'} is sharded over several meshes, or by the names of a mesh's dimensions "
            "(dp_mesh_dims), which cannot be repeated for a copy: save the adapter on every rank "
            "(lora_fx.save_adapter), and load it onto a model that is not sharded"
        )
    first = groups[0]
    after, size = first.post_forward_mesh_info, first.mesh_info.shard_mesh_size
    again: bool | int | None = None
    chosen = not torch_private.fsdp_chose_resharding(unit)
    if chosen and after is None:
        again = False
    elif chosen:
        again = True if after.shard_mesh_size == size else after.shard_mesh_size
    return {
        "mesh": first.mesh_info.mesh,
        "mp_policy": torch_private.fsdp_precision(unit),
        "offload_policy": first.offload_policy,
        "reshard_after_forward": again,
    }


def shard_again(model: nn.Module, units: tuple[ShardedUnit, ...]) -> None:
    """Has FSDP2 shard a model as it has sharded the one that this is a copy of; no values are moved.

    Args:
        model: A copy, whose parameters are in parts already. It is changed.
        units: Those of the original. Parameters that the copy does not have any more are passed over.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        modules = [model.get_submodule(name) for name in unit.modules]
        places: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        stand_ins: dict[int, nn.Parameter] = {}
        placements: dict[int, Any] = {}
        moved: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, part in unit.parts.items():
            real = places.get(name)
            if real is None:
                continue
            if id(real) not in stand_ins:
                stand_ins[id(real)] = part.stand_in(real)
                placements[id(stand_ins[id(real)])] = part.placement
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[leaf] = stand_ins[id(real)]
            moved.append((module, leaf, real))
        ignored = {
            parameter
            for module in modules
            for parameter in module.parameters()
            if id(parameter) not in placements
        }
        fully_shard(
            modules[0] if len(modules) == 1 else modules,
            **unit.options,
            shard_placement_fn=lambda given, known=placements: known.get(id(given)),
            ignored_params=ignored,
        )
        for module, leaf, real in moved:
            module._parameters[leaf] = real


def copy_units(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[Any, dict[int, Any]], Any]
) -> Callable[[], None]:
    """Prepares a copy of a sharded model in which nothing of FSDP2 is left.

    Args:
        model: The model; it is not touched.
        memo: That of ``copy.deepcopy``: it gets what stands for the units, and for hooks.
        copied: Copies a value with the memo.

    Returns:
        What is called after the model was copied: it fills in the modules that were units.
    """
    units = [module for module in model.modules() if is_unit(module)]
    made = {}
    for unit in units:
        own = _without_fsdp(type(unit))
        made[unit] = memo[id(unit)] = object.__new__(own)
    for module in model.modules() if units else ():
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        for value in hooks:
            if isinstance(value, dict) and any(map(_is_hook_of_fsdp, value.values())):
                rest = type(value)(
                    (key, one) for key, one in value.items() if not _is_hook_of_fsdp(one)
                )
                memo[id(value)] = copied(rest, memo)

    def fill() -> None:
        left = torch_private.unit_attributes() if made else ()
        for unit, new in made.items():
            held = {key: value for key, value in vars(unit).items() if key not in left}
            new.__dict__.update(copied(held, memo))

    return fill


def _without_fsdp(cls: type) -> type[nn.Module]:
    """The class of a unit before it was one."""
    place = next(place for place, one in enumerate(cls.__mro__) if one.__name__ == "FSDPModule")
    found: type[nn.Module] = cls.__mro__[place + 1]
    return found


def _is_hook_of_fsdp(hook: Any) -> bool:
    return callable(hook) and module_of_hook(hook).startswith("torch.distributed.fsdp")
