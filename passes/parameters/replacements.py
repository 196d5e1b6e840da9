"""The values of a site's weight, whatever it is stored in: replaced, quantized, or held in parts."""

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
from lora_fx.runtime import AdapterModule, KeptTensors

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
    "reshard",
    "weight_at",
    "with_part",
    "write",
]

KEPT = "lora_own_"
"""What is before the name of a parameter in that of the module that has adapters' values of it."""


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by each of their names: what belongs to adapters is left out."""
    found: dict[str, nn.Parameter] = {}
    for fqn, module in base_modules(model, every_name=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[join(fqn, name)] = parameter
    return found


def base_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The base's modules, by their first name or by each of them."""
    # As named_modules does, which asks every module above for each of those below it.
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
    """As ``get_submodule``, which asks several questions at each step."""
    found: nn.Module | None = model
    for atom in fqn.split(".") if fqn else ():
        below = found._modules if found is not None else {}
        if atom not in below:
            return model.get_submodule(fqn)
        found = below[atom]
    return model.get_submodule(fqn) if found is None else found


def weight_at(model: nn.Module, name: str) -> torch.Tensor:
    """As ``get_parameter``, likewise; also a weight that is computed of one: :func:`is_computed`."""
    owner, _, leaf = name.rpartition(".")
    module = module_at(model, owner)
    if not is_computed(module, leaf):
        return module.get_parameter(leaf)
    computed: torch.Tensor = getattr(module, leaf)
    return computed


def is_computed(module: nn.Module, leaf: str) -> bool:
    """Whether a module computes a tensor where it had a parameter (torch.nn.utils.prune, or parametrize)."""
    if leaf in module.__dict__:
        return isinstance(module.__dict__[leaf], torch.Tensor)
    if leaf in module._parameters:
        return False
    return isinstance(getattr(module, leaf, None), torch.Tensor)


def in_adapter(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to an adapter, and not to the base."""
    owner, _, _ = name.rpartition(".")
    return isinstance(module_at(model, owner), AdapterModule)


def own_value(model: nn.Module, adapter: str, name: str) -> nn.Parameter:
    """What an adapter has in place of a parameter, wherever it is now."""
    owner, leaf = _owner(model, name)
    beside = owner._modules.get(KEPT + leaf)
    if beside is not None and adapter in beside._parameters:
        return beside.get_parameter(adapter)
    return owner.get_parameter(leaf)


@contextmanager
def computed_as_parameters(model: nn.Module) -> Iterator[None]:
    """Has weights that a hook computes before each call (torch.nn.utils.prune) as parameters, for a while.

    Passes look for the weights of a graph among the parameters of its module.
    """
    held = [
        (module, leaf, value)
        for _, module in base_modules(model)
        for leaf, value in list(vars(module).items())
        if isinstance(value, torch.Tensor) and f"{leaf}_orig" in module._parameters
    ]
    for module, leaf, value in held:
        del vars(module)[leaf]
        module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
    try:
        yield
    finally:
        for module, leaf, value in held:
            del module._parameters[leaf]
            vars(module)[leaf] = value


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """As ``get_parameter``, which sees none in a module that is scripted; None if there is none."""
    owner, _, leaf = name.rpartition(".")
    try:
        held = module_at(model, owner)._parameters
    except AttributeError:
        return None
    # What holds those of a module that is scripted has no get().
    return held[leaf] if leaf in held else None  # noqa: SIM401


def place_own(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Puts what an adapter has beside the base into it."""
    for _, owner, leaf in _places(model, names):
        beside = owner._modules[KEPT + leaf]
        assert isinstance(beside, KeptTensors)
        kept, here = beside._parameters.pop(adapter), owner._parameters[leaf]
        assert kept is not None
        if here is not None and (is_sharded(here) or is_partitioned(here)):
            write(here, kept)
        else:
            owner._parameters[leaf] = kept
        if not beside._parameters:
            del owner._modules[KEPT + leaf]


def place_base(
    model: nn.Module,
    adapter: str,
    names: Iterable[str],
    originals: Mapping[str, torch.Tensor],
    *,
    keep: bool = True,
) -> None:
    """Puts the base's own parameters back in, and what the adapter has beside them.

    Args:
        model: A rewritten model.
        adapter: The adapter.
        names: FQNs of what it has there.
        originals: The base's values. What shares its memory is one parameter again.
        keep: Whether the adapter's values are kept.
    """
    names = set(names)
    live = {memory_of(p): p for n, p in base_parameters(model).items() if n not in names}
    for name, owner, leaf in _places(model, sorted(names)):
        old, original = owner.get_parameter(leaf), originals[name]
        if not keep and isinstance(original, nn.Parameter) and is_partitioned(original):
            memory = memory_of(original)
            if memory not in live:
                live[memory] = partitioned_twin(original)
            owner._parameters[leaf] = live[memory]
            continue
        if not keep and (is_sharded(old) or is_partitioned(old)):
            # Of a copy, whose parts another model has, too.
            value = distributed_as(original.detach().to(old.dtype), old)
            here = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            owner._parameters[leaf] = here
            continue
        if is_sharded(old) or is_partitioned(old):
            # Its values are exchanged: the parameter is the library's, and the optimizer's.
            if keep:
                own = (gathered(old, name) if is_partitioned(old) else old.detach()).clone()
                _beside(owner, leaf).add(adapter, nn.Parameter(own))
            write(old, original)
            continue
        memory = memory_of(original)
        if memory not in live:
            value = original.detach().to(old.device, old.dtype)
            live[memory] = nn.Parameter(value, requires_grad=False)
            vars(live[memory]).update(vars(old))  # as what transformers has noted on it
        owner._parameters[leaf] = live[memory]
        if keep:
            _beside(owner, leaf).add(adapter, old)


def put_back(model: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
    """Undoes replacements.

    Args:
        model: A rewritten model.
        before: Its :func:`base_parameters` at some time.
    """
    for name, owner, leaf in _places(model, before):
        owner._parameters[leaf] = before[name]


def _beside(owner: nn.Module, leaf: str) -> KeptTensors:
    if KEPT + leaf not in owner._modules:
        owner.add_module(KEPT + leaf, KeptTensors().train(owner.training))
    beside = owner.get_submodule(KEPT + leaf)
    assert isinstance(beside, KeptTensors)
    return beside


def _places(model: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, nn.Module, str]]:
    """Each place once, also that in a module that the model holds several times."""
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
    """The weight in the layout of the site: the parameter's own memory, or values made of few bits."""
    weight = weight_at(model, site.weight)
    if site.quantized is None:
        return detached(weight)
    # Not detached: the scales are attributes of the parameter.
    values = dense(weight)
    return values if site.layout == "out_in" else values.T


def base_dtype(model: nn.Module, site: Site) -> torch.dtype:
    """Return the dtype of the values of a site's weight."""
    if site.quantized is not None:
        return site.quantized.dtype
    return weight_at(model, site.weight).dtype


# --- parameters that processes hold in parts ------------------------------------------------------
# Parameters that a library has cut into parts: each process holds one, and the library owns the
# parameter.
#
# FSDP2 puts the whole parameter in before a call and its own part afterwards, whatever is there in
# between. So such a parameter is not exchanged: values are copied into it.


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is cut into parts (a DTensor)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its gradient; the parameter itself where ZeRO-3 finds the values by its attributes."""
    return tensor if is_partitioned(tensor) else tensor.detach()


def gathered(tensor: torch.Tensor, name: str = "a parameter") -> torch.Tensor:
    """All of a tensor, which FSDP2 shards (a DTensor) or ZeRO-3: then every rank has to call this.

    Args:
        tensor: Any.
        name: What it is, for an error.

    Raises:
        ProcessError: If another process that holds a part of it does not answer.
    """
    if is_partitioned(tensor) and tensor.shape != whole_shape(tensor):
        return _from_partitions(tensor, name)
    found: Any = tensor.detach()
    whole: torch.Tensor = found
    if is_sharded(found):
        with answering(name):
            whole = found.full_tensor()
    return whole


def _from_partitions(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of what the processes of ZeRO-3 hold of a parameter: the parameter itself is empty again."""
    with answering(name), put_together(tensor):
        return tensor.detach().clone()


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Says what was being sent where another process does not answer.

    Raises:
        ProcessError: If that is so.
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
    """This process's part of a value that every process has: nothing is sent.

    Args:
        value: The whole.
        mesh: The processes (a ``DeviceMesh``).
        placements: How it is cut, one for each dimension of the mesh.
    """
    # The package loads with the first DTensor, not with lora_fx.
    from torch.distributed.tensor import DTensor, distribute_tensor

    made = distribute_tensor(value, mesh, placements, src_data_rank=None)
    part: torch.Tensor = made.to_local()
    if part.untyped_storage().nbytes() == part.nbytes:
        return made
    # Not a view, which would keep the memory of the whole.
    own = part.detach().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=made.shape, stride=made.stride()
    )


def with_part(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor that is cut as another one is, of this process's part; nothing is sent."""
    from torch.distributed.tensor import DTensor

    there: Any = like
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        part,
        there.device_mesh,
        there.placements,
        run_check=False,
        shape=like.shape,
        stride=stride,
    )


def distributed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole value as another tensor lies; the value itself where that one is whole.

    Of a tensor that ZeRO-3 partitions it is a parameter, which ZeRO-3 knows.
    """
    if is_partitioned(like):
        return value if is_partitioned(value) else partition_of(value, like)
    if not is_sharded(like) or is_sharded(value):
        return value
    there: Any = like
    return distributed(value.to(like.device), there.device_mesh, there.placements)


def agreed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value that each process has drawn for itself, as the first of those that share a tensor has it.

    Args:
        value: The whole.
        like: A tensor that they hold in parts; nothing is sent where it is whole.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    there: Any = like
    everywhere = [Replicate()] * there.device_mesh.ndim
    found: torch.Tensor = distribute_tensor(value, there.device_mesh, everywhere).to_local()
    return found


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole value into a tensor of a model, into this rank's part of it where it is sharded.

    Every rank has to call this where it is: what the first one has is taken.
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
    """Has FSDP2 put its parts of all parameters in, also where it keeps whole ones after a call."""
    for module in model.modules():
        if is_unit(module):
            owner: Any = module
            owner.reshard()


def check_whole(named: Iterable[tuple[str, torch.Tensor]], error: type[LoraFxError]) -> None:
    """Refuses parameters that DeepSpeed's ZeRO-3 owns, for what runs the model outside of its engine.

    Args:
        named: Parameters by name.
        error: What is raised.
    """
    for name, tensor in named:
        if is_partitioned(tensor):
            raise error(
                f"{name} is partitioned by ZeRO-3, which takes its values away between calls: save the "
                "adapter on every rank (lora_fx.save_adapter, which gathers it), load it onto a model that "
                "is not partitioned, and use that"
            )
