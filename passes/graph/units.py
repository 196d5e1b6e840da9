"""Units of a model that FSDP2 shards: how to list them, copy a model without them, and shard the copy.

A unit is a module, or a list of modules, that was passed to ``fully_shard``. FSDP2 changes the class of each
unit to a subclass, and keeps its state in hooks. Neither can be copied. So a copy has the modules' original
classes and the same shards, and is sharded in the same way at the end.
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
    """Return True if a module was passed to ``fully_shard`` of FSDP2."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


@dataclasses.dataclass(frozen=True)
class ShardedUnit:
    """Arguments of one call of ``fully_shard``.

    Attributes:
        modules: FQNs of the modules that form the unit.
        options: The arguments of the call.
        parts: Shard layout of each parameter, by FQN.
    """

    modules: tuple[str, ...]
    options: Mapping[str, Any]
    parts: Mapping[str, _Part]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Shard layout of a parameter under FSDP2.

    Attributes:
        placement: Placement with the dimension that is sharded.
        spec: Layout of the parameter under tensor parallelism, or None without tensor parallelism.
        size: Size of the tensor that FSDP2 shards: the parameter, or its local part under tensor
            parallelism.
    """

    placement: Any
    spec: Any
    size: torch.Size

    def stand_in(self, like: torch.Tensor) -> nn.Parameter:
        """Return an unsharded meta parameter, which replaces the real parameter during ``fully_shard``."""
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
    """Return the units of a model, inner units first, in the order of the ``fully_shard`` calls.

    Raises:
        CaptureError: If a unit is sharded in a way that cannot be repeated.
    """
    names = {module: name for name, module in model.named_modules()}
    states: dict[int, list[nn.Module]] = {}
    for module in names:
        if is_unit(module):
            states.setdefault(id(torch_private.fsdp_state(module)), []).append(module)
    groups = [
        group for modules in states.values() for group in torch_private.fsdp_groups(modules[0])
    ]
    units = []
    # named_modules goes from the top down, so the reversed order has inner units first.
    for modules in reversed(states.values()):
        mine = torch_private.fsdp_groups(modules[0])
        parts = {
            name: _Part(
                parameter.fsdp_placement,
                torch_private.fsdp_spec(parameter),
                torch_private.fsdp_size(parameter),
            )
            for group in mine
            for parameter in group.fsdp_params
            for name in _names(parameter, names)
        }
        fqns = tuple(names[module] for module in modules)
        options = _options(modules[0], fqns[0], mine or groups[:1])
        units.append(ShardedUnit(fqns, options, parts))
    return tuple(units)


def _names(parameter: Any, names: Mapping[nn.Module, str]) -> Iterator[str]:
    """Yield the FQNs of a parameter of FSDP2, which several modules may share."""
    info = torch_private.fsdp_owner(parameter)
    yield join(names[info.module], info.param_name)
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        yield join(names[module], name)


def _options(unit: nn.Module, name: str, groups: list[Any]) -> dict[str, Any]:
    meshes = [group.mesh_info for group in groups]
    if not meshes or any(
        mesh.mesh != meshes[0].mesh or getattr(mesh, "spmd_mesh", None) is not None
        for mesh in meshes
    ):
        raise CaptureError(
            f"{name or 'the model'} is sharded over several meshes, or by the names of a mesh's dimensions "
            "(dp_mesh_dims), which cannot be repeated for a copy: save the adapter on every rank "
            "(lora_fx.save_adapter), and load it onto a model that is not sharded"
        )
    first = groups[0]
    after, size = first.post_forward_mesh_info, first.mesh_info.shard_mesh_size
    reshard: bool | int | None = None
    chosen = not torch_private.fsdp_chose_resharding(unit)
    if chosen and after is None:
        reshard = False
    elif chosen:
        reshard = True if after.shard_mesh_size == size else after.shard_mesh_size
    return {
        "mesh": first.mesh_info.mesh,
        "mp_policy": torch_private.fsdp_precision(unit),
        "offload_policy": first.offload_policy,
        "reshard_after_forward": reshard,
    }


def shard_again(model: nn.Module, units: tuple[ShardedUnit, ...]) -> None:
    """Shard a copy of a model with FSDP2 as the original is sharded. No values are moved.

    Args:
        model: A copy, whose parameters are sharded already. It is changed.
        units: The units of the original. Parameters that the copy does not have are skipped.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        modules = [model.get_submodule(name) for name in unit.modules]
        parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        stand_ins: dict[int, nn.Parameter] = {}
        placements: dict[int, Any] = {}
        moved: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, part in unit.parts.items():
            real = parameters.get(name)
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
            shard_placement_fn=lambda parameter, known=placements: known.get(id(parameter)),
            ignored_params=ignored,
        )
        for module, leaf, real in moved:
            module._parameters[leaf] = real


def copy_units(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[Any, dict[int, Any]], Any]
) -> Callable[[], None]:
    """Prepare a copy of a sharded model without classes and hooks of FSDP2.

    Args:
        model: The model; it is not touched.
        memo: The memo of ``copy.deepcopy``. Replacements for the units and for dicts of hooks are added.
        copied: Copies a value with the memo.

    Returns:
        A function to call after the model was copied. It copies the attributes of the units.
    """
    units = [module for module in model.modules() if is_unit(module)]
    copies = {}
    for unit in units:
        own = _without_fsdp(type(unit))
        copies[unit] = memo[id(unit)] = object.__new__(own)
    for module in model.modules() if units else ():
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        for value in hooks:
            if isinstance(value, dict) and any(map(_is_hook_of_fsdp, value.values())):
                kept = type(value)(
                    (key, hook) for key, hook in value.items() if not _is_hook_of_fsdp(hook)
                )
                memo[id(value)] = copied(kept, memo)

    def fill() -> None:
        left = torch_private.unit_attributes() if copies else ()
        for unit, new in copies.items():
            attributes = {key: value for key, value in vars(unit).items() if key not in left}
            new.__dict__.update(copied(attributes, memo))

    return fill


def _without_fsdp(cls: type) -> type[nn.Module]:
    """Return the class that a unit had before ``fully_shard``."""
    index = next(index for index, base in enumerate(cls.__mro__) if base.__name__ == "FSDPModule")
    result: type[nn.Module] = cls.__mro__[index + 1]
    return result


def _is_hook_of_fsdp(hook: Any) -> bool:
    return callable(hook) and module_of_hook(hook).startswith("torch.distributed.fsdp")
