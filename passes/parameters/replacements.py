"""Read and replace tensors of the base that an adapter replaces, a format packs, or processes split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, ProcessError
from lora_fx.formats import dense
from lora_fx.ir import Site, join
from lora_fx.passes.graph import (
    is_partitioned,
    is_unit,
    memory_of,
    partition_of,
    partitioned_twin,
    put_together,
    whole_shape,
)
from lora_fx.runtime.modules import AdapterModule, KeptTensors

__all__ = [
    "KEPT",
    "agreed",
    "answering",
    "base_dtype",
    "base_modules",
    "base_parameters",
    "base_weight",
    "check_whole",
    "computed_as_parameters",
    "detached",
    "distributed",
    "distributed_as",
    "gathered",
    "in_adapter",
    "is_computed",
    "is_sharded",
    "module_at",
    "own_value",
    "parameter_of",
    "place_base",
    "place_own",
    "put_back",
    "replaceable",
    "reshard",
    "weight_at",
    "with_part",
    "write",
]

KEPT = "lora_own_"
"""Prefix of the name of the module that stores the values of inactive adapters for a tensor of the base."""


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base by each of their names, without the parameters of adapters."""
    parameters: dict[str, nn.Parameter] = {}
    for fqn, module in base_modules(model, every_name=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters[join(fqn, name)] = parameter
    return parameters


def replaceable(model: nn.Module, name: str) -> torch.Tensor:
    """Return a tensor that an adapter may replace: a parameter, or a buffer of statistics."""
    owner, leaf = _owner(model, name)
    return owner.get_buffer(leaf) if leaf in owner._buffers else owner.get_parameter(leaf)


def base_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base, each with its first name, or with each of its names."""
    # Same order as named_modules, which is slower because it yields each module through all its parents.
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        fqn, module = pending.pop()
        if module in seen:
            continue
        if not every_name:
            seen.add(module)
        if not isinstance(module, AdapterModule):
            yield fqn, module
        if module._modules:
            prefix = f"{fqn}." if fqn else ""
            below = [(prefix + name, m) for name, m in module._modules.items() if m is not None]
            pending += below[::-1]


def module_at(model: nn.Module, fqn: str) -> nn.Module:
    """Return a submodule, like ``get_submodule``, but with fewer checks at each step."""
    module: nn.Module | None = model
    for atom in fqn.split(".") if fqn else ():
        below = module._modules if module is not None else {}
        if atom not in below:
            return model.get_submodule(fqn)
        module = below[atom]
    return model.get_submodule(fqn) if module is None else module


def weight_at(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter, like ``get_parameter``, or a weight computed from one: see :func:`is_computed`."""
    owner, _, leaf = name.rpartition(".")
    module = module_at(model, owner)
    if not is_computed(module, leaf):
        return module.get_parameter(leaf)
    computed: torch.Tensor = getattr(module, leaf)
    return computed


def is_computed(module: nn.Module, leaf: str) -> bool:
    """Return True if a module computes a tensor that was a parameter (torch.nn.utils.prune, parametrize)."""
    if leaf in module.__dict__:
        return isinstance(module.__dict__[leaf], torch.Tensor)
    if leaf in module._parameters:
        return False
    return isinstance(getattr(module, leaf, None), torch.Tensor)


def in_adapter(model: nn.Module, name: str) -> bool:
    """Return True if a parameter belongs to an adapter, and not to the base."""
    owner, _, _ = name.rpartition(".")
    return isinstance(module_at(model, owner), AdapterModule)


def own_value(model: nn.Module, adapter: str, name: str) -> torch.Tensor:
    """Return an adapter's value for a tensor of the base, which is in storage for an inactive adapter."""
    owner, leaf = _owner(model, name)
    stored = owner._modules.get(KEPT + leaf)
    if stored is not None and (adapter in stored._parameters or adapter in stored._buffers):
        return replaceable(stored, adapter)
    return replaceable(model, name)


@contextmanager
def computed_as_parameters(model: nn.Module) -> Iterator[None]:
    """Register weights that a hook computes before each call (torch.nn.utils.prune) as parameters.

    Passes look for the weights of a graph among the parameters of its module.
    """
    computed = [
        (module, leaf, value)
        for _, module in base_modules(model)
        for leaf, value in list(vars(module).items())
        if isinstance(value, torch.Tensor) and f"{leaf}_orig" in module._parameters
    ]
    for module, leaf, value in computed:
        del vars(module)[leaf]
        module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
    try:
        yield
    finally:
        for module, leaf, value in computed:
            del module._parameters[leaf]
            vars(module)[leaf] = value


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter, like ``get_parameter``, also of a scripted module; None if there is none."""
    owner, _, leaf = name.rpartition(".")
    try:
        parameters = module_at(model, owner)._parameters
    except AttributeError:
        return None
    # The container of a scripted module's parameters has no get().
    return parameters[leaf] if leaf in parameters else None  # noqa: SIM401


def place_own(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Replace tensors of the base by the stored values of an adapter that becomes active."""
    for _, owner, leaf in _places(model, names):
        stored = owner._modules[KEPT + leaf]
        assert isinstance(stored, KeptTensors)
        if leaf in owner._buffers:
            owner._buffers[leaf] = stored._buffers.pop(adapter)
        else:
            value, current = stored._parameters.pop(adapter), owner._parameters[leaf]
            assert value is not None
            if current is not None and (is_sharded(current) or is_partitioned(current)):
                write(current, value)
            else:
                owner._parameters[leaf] = value
        if not stored._parameters and not stored._buffers:
            del owner._modules[KEPT + leaf]


def place_base(
    model: nn.Module,
    adapter: str,
    names: Iterable[str],
    originals: Mapping[str, torch.Tensor],
    *,
    keep: bool = True,
) -> None:
    """Put the base's own parameters back when an adapter becomes inactive, and store its values.

    Args:
        model: A rewritten model.
        adapter: The adapter.
        names: FQNs of the tensors that the adapter has replaced.
        originals: The base's values. Values that share memory become one parameter again.
        keep: True to store the adapter's values, False to drop them.
    """
    names = set(names)
    live = {memory_of(p): p for n, p in base_parameters(model).items() if n not in names}
    for name, owner, leaf in _places(model, sorted(names)):
        original = originals[name]
        if leaf in owner._buffers:
            statistic = owner.get_buffer(leaf)
            # A copy, because training modes write into it.
            owner._buffers[leaf] = original.to(statistic.device, statistic.dtype, copy=True)
            if keep:
                _get_or_add_storage(owner, leaf).register_buffer(adapter, statistic)
            continue
        old = owner.get_parameter(leaf)
        if not keep and isinstance(original, nn.Parameter) and is_partitioned(original):
            memory = memory_of(original)
            if memory not in live:
                live[memory] = partitioned_twin(original)
            owner._parameters[leaf] = live[memory]
            continue
        if not keep and (is_sharded(old) or is_partitioned(old)):
            # `old` is the parameter of a copied model, and another model shares its parts.
            value = distributed_as(original.detach().to(old.dtype), old)
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            owner._parameters[leaf] = parameter
            continue
        if is_sharded(old) or is_partitioned(old):
            # Exchange only the values, because the library and the optimizer refer to this parameter.
            if keep:
                values = (gathered(old, name) if is_partitioned(old) else old.detach()).clone()
                _get_or_add_storage(owner, leaf).add(adapter, nn.Parameter(values))
            write(old, original)
            continue
        memory = memory_of(original)
        if memory not in live:
            value = original.detach().to(old.device, old.dtype)
            live[memory] = nn.Parameter(value, requires_grad=False)
            vars(live[memory]).update(vars(old))  # such as attributes that transformers sets
        owner._parameters[leaf] = live[memory]
        if keep:
            _get_or_add_storage(owner, leaf).add(adapter, old)


def put_back(model: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
    """Put earlier parameters of the base back into a model.

    Args:
        model: A rewritten model.
        before: An earlier result of :func:`base_parameters` for the model.
    """
    for name, owner, leaf in _places(model, before):
        owner._parameters[leaf] = before[name]


def _get_or_add_storage(owner: nn.Module, leaf: str) -> KeptTensors:
    """Return the module that stores inactive adapters' values of a tensor, and add it if it is missing."""
    if KEPT + leaf not in owner._modules:
        owner.add_module(KEPT + leaf, KeptTensors().train(owner.training))
    stored = owner.get_submodule(KEPT + leaf)
    assert isinstance(stored, KeptTensors)
    return stored


def _places(model: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, nn.Module, str]]:
    """Yield the name, the module and the attribute of each tensor, once if a module has several names."""
    seen: set[tuple[int, str]] = set()
    for name in names:
        owner, leaf = _owner(model, name)
        if (id(owner), leaf) not in seen:
            seen.add((id(owner), leaf))
            yield name, owner, leaf


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module_at(model, owner), leaf


def base_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """Return the weight in the layout of the site, sharing its memory. A quantized weight is dequantized."""
    weight = weight_at(model, site.weight)
    if site.quantized is None:
        return detached(weight)
    # Not detached: the scales are attributes of the parameter.
    values = dense(weight)
    return values.T if site.turned else values


def base_dtype(model: nn.Module, site: Site) -> torch.dtype:
    """Return the dtype of the values of a site's weight."""
    if site.quantized is not None:
        return site.quantized.dtype
    return weight_at(model, site.weight).dtype


# --- parameters that processes hold in parts ------------------------------------------------------
# A library may split parameters so that each process has one part. The library then owns the parameter:
# FSDP2 registers the whole parameter before a call, and its part afterwards. It overwrites any other
# parameter. So such a parameter is never replaced. Values are copied into it.


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return True if a tensor is split over processes (a DTensor)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor detached from autograd, or the parameter itself if ZeRO-3 partitions it."""
    return tensor if is_partitioned(tensor) else tensor.detach()


def gathered(tensor: torch.Tensor, name: str = "a parameter") -> torch.Tensor:
    """Return the whole of a tensor. If FSDP2 (as a DTensor) or ZeRO-3 shards it, every rank must call this.

    Args:
        tensor: The tensor. If it is not sharded, it is returned detached.
        name: The name of the tensor, for an error.

    Raises:
        ProcessError: If another process that holds a part of it does not answer.
    """
    if is_partitioned(tensor) and tensor.shape != whole_shape(tensor):
        return _from_partitions(tensor, name)
    value: Any = tensor.detach()
    whole: torch.Tensor = value
    if is_sharded(value):
        with answering(name):
            whole = value.full_tensor()
    return whole


def _from_partitions(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a copy of a parameter that ZeRO-3 partitions. The parameter itself is empty again afterwards."""
    with answering(name), put_together(tensor):
        return tensor.detach().clone()


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Replace the error of a failed communication by an error that names the tensor.

    Raises:
        ProcessError: If another process does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"{name}: another process that holds a part of it has ended, or has not called this within the "
            "timeout of the process group (init_process_group(timeout=...)). Every process has to call it; "
            f"look for the first error of the others, and start all of them again: {error}"
        ) from error


def distributed(value: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> torch.Tensor:
    """Split a value that every process has into a ``DTensor``, without communication.

    Args:
        value: The whole value.
        mesh: The processes (a ``DeviceMesh``).
        placements: The placements, one for each dimension of the mesh.
    """
    # The package loads with the first DTensor, not with lora_fx.
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = distribute_tensor(value, mesh, placements, src_data_rank=None)
    part: torch.Tensor = tensor.to_local()
    if part.untyped_storage().nbytes() == part.nbytes:
        return tensor
    # The part is a view, which would keep the memory of the whole value. So it is copied.
    copy = part.detach().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        copy, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def with_part(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a ``DTensor`` with the placements of ``like``, from this process's part. Nothing is sent."""
    from torch.distributed.tensor import DTensor

    reference: Any = like
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        part,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=like.shape,
        stride=stride,
    )


def distributed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Split a whole value over processes like another tensor. If ``like`` is whole, return the value itself.

    For a tensor that ZeRO-3 partitions the result is a parameter that ZeRO-3 manages.
    """
    if is_partitioned(like):
        return value if is_partitioned(value) else partition_of(value, like)
    if not is_sharded(like) or is_sharded(value):
        return value
    reference: Any = like
    return distributed(value.to(like.device), reference.device_mesh, reference.placements)


def agreed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the value that the first process has, because processes may have drawn different values.

    Args:
        value: The whole value.
        like: A tensor that the processes hold in parts. If it is whole, nothing is sent.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    reference: Any = like
    everywhere = [Replicate()] * reference.device_mesh.ndim
    shared: torch.Tensor = distribute_tensor(value, reference.device_mesh, everywhere).to_local()
    return shared


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value into a tensor of a model, or into this rank's part of it if it is sharded.

    If the tensor is sharded, every rank must call this. With ZeRO-3 the value of the first rank is used.
    """
    if is_partitioned(tensor):
        value = gathered(value)
        with put_together(tensor, modifier_rank=0), torch.no_grad():
            tensor.copy_(value)
        return
    value = distributed_as(value, tensor)
    with torch.no_grad():
        tensor.copy_(value)


def reshard(model: nn.Module) -> None:
    """Make FSDP2 put the shards of all parameters back, even if it keeps whole parameters after a call."""
    for module in model.modules():
        if is_unit(module):
            owner: Any = module
            owner.reshard()


def check_whole(named: Iterable[tuple[str, torch.Tensor]], error: type[LoraFxError]) -> None:
    """Raise for parameters that DeepSpeed's ZeRO-3 owns, in code that runs the model outside its engine.

    Args:
        named: Parameters by name.
        error: The class of the error.
    """
    for name, tensor in named:
        if is_partitioned(tensor):
            raise error(
                f"{name} is partitioned by ZeRO-3, which takes its values away between calls: save the "
                "adapter on every rank (lora_fx.save_adapter, which gathers it), load it onto a model that "
                "is not partitioned, and use that"
            )
