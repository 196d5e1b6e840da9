"""Branches over tensors that processes hold in parts (``DTensor``): of tensor parallelism, and of FSDP2.

The factors lie as the weight does. Cut along its outputs, B is cut along its own, and A is whole in each
process; cut along its inputs, A is cut along them, and B is whole. Then ``x Aᵀ Bᵀ`` comes out as ``x Wᵀ``
does, in parts or as terms of a sum, and nothing more is sent in a forward. The gradient of a factor that is
whole is a sum over the processes, or the mean over those that have other samples. What an adapter has for
each output feature besides (a magnitude, a bias) is cut as B is. Norms of weights are sums over the inputs:
where those are cut, each forward sums one vector over the processes.

Before processes send parts, they tell each other what they are about to do, in the store by which they have
found each other. So nothing is taken for anything else where one of them does something else, and the ones
that are missing have names.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError, ProcessError

__all__ = [
    "called_by_all",
    "check_equal",
    "check_not_in_parts",
    "compute_in_parts",
    "factor_beside",
    "is_in_parts",
    "note_whole",
    "own_part",
    "slot_beside",
    "summed_over_inputs",
]


def is_in_parts(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return torch_private.is_distributed(tensor)


_AFTERWARDS = (
    "a layer was parallelized after the rewrite, so that its adapter is whole where its weight is in parts: "
    "call parallelize_module (or from_pretrained with a tp_plan) first, and rewrite the model that it gives"
)


def check_not_in_parts(x: Any) -> None:
    """Refuses the input of a layer that was whole when its branch was fused with it.

    Raises:
        ConfigError: If it is in parts now.
    """
    if is_in_parts(x):
        raise ConfigError(_AFTERWARDS)


def factor_beside(factor: Any, like: Any) -> Any:
    """A factor as it is multiplied beside a base product: in parts, or this process's own part.

    Args:
        factor: As it is stored.
        like: What the base operation gives.

    Raises:
        ConfigError: If one is in parts in a way in which the other one is not.
    """
    if not is_in_parts(factor):
        if is_in_parts(like):
            raise ConfigError(_AFTERWARDS)
        return factor
    if is_in_parts(like) and factor.device_mesh == like.device_mesh:
        return _Part.apply(factor, None, ()) if _wants_gradient(factor) else factor  # type: ignore[no-untyped-call]
    inner = like.device_mesh if is_in_parts(like) else None
    outer = _outer_dimensions(factor, inner)
    if _wants_gradient(factor) and not all(factor.placements[one].is_replicate() for one in outer):
        raise ConfigError(
            "the factors of an adapter are in parts, and the layer computes with whole tensors here: a style "
            "of tensor parallelism that computes so cannot be trained. Leave the layer out with "
            "exclude_modules"
        )
    if not _wants_gradient(factor):
        factor = factor.detach()
    return _Part.apply(factor, inner, outer)  # type: ignore[no-untyped-call]


def slot_beside(slot: Any, a: Any, like: Any) -> Any:
    """A vector of the output features, as it is added to a base product, in its dtype.

    Where processes compute terms of a sum, each by itself, the first of them adds it.

    Args:
        slot: As it is stored.
        a: The factor A of the same adapter.
        like: What the base operation gives.
    """
    found = factor_beside(slot, like) if is_in_parts(slot) or is_in_parts(like) else slot
    if is_in_parts(a) and not is_in_parts(like):
        mine = a.device_mesh.get_coordinate()
        cut = [place for place, one in enumerate(a.placements) if one.is_shard()]
        if any(mine[place] for place in cut):
            found = torch.zeros_like(found)
    return found.to(like.dtype)


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, detached; the tensor itself where it is whole."""
    found = torch_private.local_tensor(tensor)
    return found.detach()


def summed_over_inputs(sums: Tensor, a: Any) -> Tensor:
    """Sums that go over the inputs of a layer, from those over the inputs of each process.

    Args:
        sums: [out], or this process's part of it.
        a: The factor A, which is cut as the inputs are: nothing is sent where it is whole.
    """
    for place, placement in enumerate(a.placements):
        if placement.is_shard():
            sums = torch_private.all_reduce(sums, "sum", (a.device_mesh, place))
    return sums


def compute_in_parts(
    function: Callable[..., Tensor], outputs: tuple[Any, ...], vector: Any
) -> Tensor:
    """What a function that is linear in outputs makes of them: each process has it make its own part.

    Args:
        function: Takes the parts of the outputs, and of the vector.
        outputs: ``DTensor``s of one shape. The result lies as the first of them.
        vector: Of the output features: over the same mesh.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    first = outputs[0]
    features = [one.is_shard(first.dim() - 1) for one in first.placements]
    gradients = [Replicate() if one.is_partial() else one for one in first.placements]
    parts = [
        one.redistribute(placements=first.placements).to_local(grad_placements=gradients)
        for one in outputs
    ]
    # Its gradient is a sum over all elements of a feature, wherever they are.
    sums = [
        Shard(0) if of_features else Replicate() if one.is_replicate() else Partial()
        for of_features, one in zip(features, first.placements, strict=True)
    ]
    there = [Shard(0) if of_features else Replicate() for of_features in features]
    own = vector.redistribute(placements=there).to_local(grad_placements=sums)
    return DTensor.from_local(
        function(*parts, own),
        first.device_mesh,
        first.placements,
        run_check=False,
        shape=first.shape,
        stride=first.stride(),
    )


def _wants_gradient(factor: Tensor) -> bool:
    return factor.requires_grad and torch.is_grad_enabled()


def _outer_dimensions(factor: Any, inner: Any) -> tuple[int, ...]:
    """The dimensions of a factor's mesh that the base product does not have."""
    every = tuple(range(factor.device_mesh.ndim))
    if inner is None:
        return every
    names = factor.device_mesh.mesh_dim_names or ()
    known = inner.mesh_dim_names or ()
    return tuple(one for one in every if one >= len(names) or names[one] not in known)


class _Part(torch.autograd.Function):
    """A factor over an inner mesh (None: no mesh), whose gradient lies as the factor does."""

    @staticmethod
    def forward(ctx: Any, factor: Any, inner: Any, outer: tuple[int, ...]) -> Any:
        from torch.distributed.tensor import DTensor

        ctx.mesh, ctx.placements, ctx.outer = factor.device_mesh, factor.placements, outer
        ctx.size = factor.shape, factor.stride()
        if not outer:
            return factor.view_as(factor)
        local = torch_private.local_tensor(factor)
        if inner is None:
            return local.view_as(local)
        placements = [one for place, one in enumerate(factor.placements) if place not in outer]
        shape, stride = ctx.size
        return DTensor.from_local(
            local, inner, placements, run_check=False, shape=shape, stride=stride
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None]:
        from torch.distributed.tensor import DTensor, Partial

        (grad,) = grads
        if not ctx.outer:
            return grad.redistribute(placements=ctx.placements), None, None
        inner = iter(grad.placements if is_in_parts(grad) else ())
        local = torch_private.local_tensor(grad)
        # Those that have other samples: the mean, as FSDP and DDP take it.
        local = local / math.prod(ctx.mesh.size(place) for place in ctx.outer)
        placements = [
            Partial() if place in ctx.outer else next(inner) for place in range(len(ctx.placements))
        ]
        shape, stride = ctx.size
        whole = DTensor.from_local(
            local, ctx.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return whole.redistribute(placements=ctx.placements), None, None


# --- what processes tell each other --------------------------------------------------------------------

_calls: Counter[str] = Counter()
_SHORTEST, _LONGEST = 0.001, 0.1  # seconds between two looks
_NOTES = "_lora_fx_whole"


def called_by_all(tensors: Iterable[Tensor], what: str, word: str = "") -> dict[int, str]:
    """Waits until every process that holds parts of some tensors has come here, too.

    What one process sends alone the others would take for something else. Nothing is asked where all tensors
    are whole.

    Args:
        tensors: What is gathered afterwards.
        what: What that is for, for an error.
        word: What this process tells the others.

    Returns:
        What each of them has told, by its rank.

    Raises:
        ProcessError: With the ranks that have not come within the timeout of the process group.
    """
    ranks = _holders(tensors)
    if len(ranks) < 2:
        return {}
    import torch.distributed as dist

    store = torch_private.group_store()
    place = f"lora_fx {what} {ranks}"
    number = _calls[place]
    keys = {rank: f"{place} {number} {rank}" for rank in ranks}
    mine = dist.get_rank()
    store.set(keys[mine], word)
    end, pause = time.monotonic() + store.timeout.total_seconds(), _SHORTEST
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if time.monotonic() > end:
            # A later call begins where the others are.
            store.delete_key(keys[mine])
            raise ProcessError(
                f"{what}: every process that holds a part has to call this, and rank "
                f"{', '.join(map(str, missing))} has ended, or has not called this within the timeout of the "
                "process group (init_process_group(timeout=...)). Call it on every rank, not on the first "
                "alone: that one writes. Else look for the first error of the others, and start all again"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    told = {rank: bytes(store.get(key)).decode() for rank, key in keys.items()} if word else {}
    _calls[place] = number + 1
    if number:
        # All have passed the call before this one.
        store.delete_key(f"{place} {number - 1} {mine}")
    return told


def _holders(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The ranks of the processes that hold parts of some tensors; none where nothing can be sent."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() == "fake":
        return ()
    meshes: dict[int, Any] = {}
    groups: dict[int, Any] = {}
    for tensor in tensors:
        one: Any = tensor
        if _is_cut(one):
            meshes[id(one.device_mesh)] = one.device_mesh
        elif hasattr(one, "ds_process_group"):  # of DeepSpeed's ZeRO-3
            groups[id(one.ds_process_group)] = one.ds_process_group
    found = {rank for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist()}
    found |= {rank for one in groups.values() for rank in dist.get_process_group_ranks(one)}
    return tuple(sorted(found))


def _is_cut(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def note_whole(module: nn.Module, name: str, value: Any) -> None:
    """Notes what a factor was when it is cut into parts (``fully_shard``), for :func:`check_equal`.

    Args:
        module: Holds the factor.
        name: The factor's.
        value: What is about to take its place.
    """
    if not _is_cut(value):
        return
    whole = module._parameters.get(name)
    notes = vars(module).setdefault(_NOTES, {})
    if whole is None or name in notes or _is_cut(whole):
        return
    notes[name] = (_digest(whole), value, _version(value))


def _digest(whole: Tensor) -> str:
    found = hashlib.blake2b(f"{list(whole.shape)} {whole.dtype}".encode(), digest_size=8)
    try:
        values = whole.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    except (NotImplementedError, RuntimeError):  # on the meta device, or fake: there are none
        return _UNKNOWN
    found.update(values.tobytes())
    return found.hexdigest()


_UNKNOWN = "?"


def _version(value: Any) -> int:
    """How often a tensor was written into: what is done to the whole is not counted for the part."""
    return torch_private.version_counter(value) + torch_private.version_counter(
        torch_private.local_tensor(value)
    )


def check_equal(model: nn.Module) -> None:
    """Refuses a model whose factors were not the same in all processes when FSDP2 has cut them, once.

    Each process has kept its part of its own, and all of them would train a mixture. Factors that were
    written into since are taken for equal, and so are those that had no values.

    Raises:
        ConfigError: In every process, with the first factor that differs.
        ProcessError: If a process does not come here.
    """
    noted = list(_noted(model))
    if not noted:
        return
    mine = {
        name: digest if _version(value) == version else _UNKNOWN
        for name, (digest, value, version) in noted
    }
    several = called_by_all(
        (value for _, (_, value, _) in noted), "the first use", json.dumps(mine)
    )
    for module in model.modules():
        # The names stay: a factor that is cut is put in again at each call.
        for name in vars(module).get(_NOTES, ()):
            vars(module)[_NOTES][name] = None
    told = {rank: json.loads(word) for rank, word in several.items()}
    first = min(told, default=0)
    for rank, theirs in told.items():
        for name in (*told[first], *theirs):
            pair = told[first].get(name), theirs.get(name)
            if pair[0] != pair[1] and _UNKNOWN not in pair:
                raise ConfigError(
                    f"{name}: on rank {rank} it was another one than on rank {first} when fully_shard cut "
                    "it, so that what is trained would be a mixture: give every process the same "
                    "configuration, and load the same folder"
                )


def _noted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for fqn, module in model.named_modules():
        for name, note in vars(module).get(_NOTES, {}).items():
            if note is not None:
                yield f"{fqn}.{name}", note
