"""Adapter branches over sharded tensors (``DTensor``), for tensor parallelism and FSDP2.

The factors are sharded like the weight. If the outputs of the weight are sharded, B is sharded along its
outputs, and A is replicated. If the inputs are sharded, A is sharded along its inputs, and B is replicated.
Then ``x Aᵀ Bᵀ`` has the placements of ``x Wᵀ``, sharded or partial, and a forward sends nothing more. The
gradient of a replicated factor is a sum over the ranks, or a mean over ranks with different samples. Other
vectors over the output features (a magnitude, a bias) are sharded like B. Norms of weights are sums over the
inputs. If these are sharded, each forward all-reduces one vector.

Before ranks send shards, they announce the operation in the rendezvous store of the process group. Thus
operations of different ranks are never mixed up, and errors name the missing ranks.
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
from lora_fx.digests import add_values
from lora_fx.errors import ConfigError, ProcessError, QuantizationError
from lora_fx.formats import WHOLE_WEIGHTS, formats, quantization_of
from lora_fx.ir import record_of

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
    """Return True if a tensor is a ``DTensor``."""
    return torch_private.is_distributed(tensor)


_AFTERWARDS = (
    "a layer was parallelized after the rewrite, so that its adapter is whole where its weight is in parts: "
    "call parallelize_module (or from_pretrained with a tp_plan) first, and rewrite the model that it gives"
)


def check_not_in_parts(x: Any) -> None:
    """Raise if the input of a layer is a ``DTensor``, which the fused branch does not support.

    The layer was parallelized after its branch was fused.

    Raises:
        ConfigError: If ``x`` is a ``DTensor``.
    """
    if is_in_parts(x):
        raise ConfigError(_AFTERWARDS)


def factor_beside(factor: Any, like: Any) -> Any:
    """Return a factor as the kind of tensor that the base product is: a ``DTensor``, or a local tensor.

    Args:
        factor: The factor as it is stored.
        like: Output of the base operation.

    Raises:
        ConfigError: If the shardings of the two do not match.
    """
    if not is_in_parts(factor):
        if is_in_parts(like):
            raise ConfigError(_AFTERWARDS)
        return factor
    if is_in_parts(like) and factor.device_mesh == like.device_mesh:
        return _Part.apply(factor, None, ()) if _wants_gradient(factor) else factor  # type: ignore[no-untyped-call]
    inner = like.device_mesh if is_in_parts(like) else None
    outer = _outer_dimensions(factor, inner)
    if _wants_gradient(factor) and not all(factor.placements[dim].is_replicate() for dim in outer):
        raise ConfigError(
            "the factors of an adapter are in parts, and the layer computes with whole tensors here: a style "
            "of tensor parallelism that computes so cannot be trained. Leave the layer out with "
            "exclude_modules"
        )
    if not _wants_gradient(factor):
        factor = factor.detach()
    return _Part.apply(factor, inner, outer)  # type: ignore[no-untyped-call]


def slot_beside(slot: Any, a: Any, like: Any) -> Any:
    """Return a vector of the output features as the kind of tensor, and in the dtype, of the base product.

    If each rank computes a local term of a sum, the first rank gets the vector, and other ranks get zeros.

    Args:
        slot: The vector as it is stored.
        a: The factor A of the same adapter.
        like: Output of the base operation.
    """
    vector = factor_beside(slot, like) if is_in_parts(slot) or is_in_parts(like) else slot
    if is_in_parts(a) and not is_in_parts(like):
        mine = a.device_mesh.get_coordinate()
        cut = [dim for dim, placement in enumerate(a.placements) if placement.is_shard()]
        if any(mine[dim] for dim in cut):
            vector = torch.zeros_like(vector)
    return vector.to(like.dtype)


def own_part(tensor: Any) -> Tensor:
    """Return the detached local part of a tensor. This is the tensor itself unless it is a ``DTensor``."""
    local = torch_private.local_tensor(tensor)
    return local.detach()


def summed_over_inputs(sums: Tensor, a: Any) -> Tensor:
    """Return sums over all inputs of a layer, from the sums over the inputs of each rank.

    Args:
        sums: [out], or the local part of it.
        a: The factor A, which is sharded like the inputs. If it is not sharded, nothing is sent.
    """
    for dim, placement in enumerate(a.placements):
        if placement.is_shard():
            sums = torch_private.all_reduce(sums, "sum", (a.device_mesh, dim))
    return sums


def compute_in_parts(
    function: Callable[..., Tensor], outputs: tuple[Any, ...], vector: Any
) -> Tensor:
    """Apply a function that is linear in ``outputs`` to the local tensors of each rank.

    Args:
        function: Function of the local tensors of the outputs and of the vector.
        outputs: ``DTensor``s of one shape. The result has the placements of the first.
        vector: Vector of the output features, over the same mesh.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    first = outputs[0]
    features = [placement.is_shard(first.dim() - 1) for placement in first.placements]
    gradients = [
        Replicate() if placement.is_partial() else placement for placement in first.placements
    ]
    parts = [
        output.redistribute(placements=first.placements).to_local(grad_placements=gradients)
        for output in outputs
    ]
    # The gradient of the vector is a sum over all elements of a feature, on all ranks.
    sums = [
        Shard(0) if of_features else Replicate() if placement.is_replicate() else Partial()
        for of_features, placement in zip(features, first.placements, strict=True)
    ]
    vector_placements = [Shard(0) if of_features else Replicate() for of_features in features]
    own = vector.redistribute(placements=vector_placements).to_local(grad_placements=sums)
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
    """Return the dimensions of a factor's mesh that the mesh of the base product does not have."""
    every = tuple(range(factor.device_mesh.ndim))
    if inner is None:
        return every
    names = factor.device_mesh.mesh_dim_names or ()
    known = inner.mesh_dim_names or ()
    return tuple(dim for dim in every if dim >= len(names) or names[dim] not in known)


class _Part(torch.autograd.Function):
    """Autograd function that returns a factor over an inner mesh, or its local tensor if the mesh is None.

    The gradient gets the placements of the factor.
    """

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
        placements = [
            placement for dim, placement in enumerate(factor.placements) if dim not in outer
        ]
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
        # Ranks of these dimensions have different samples. Average over them, like FSDP and DDP.
        local = local / math.prod(ctx.mesh.size(dim) for dim in ctx.outer)
        placements = [
            Partial() if dim in ctx.outer else next(inner) for dim in range(len(ctx.placements))
        ]
        shape, stride = ctx.size
        whole = DTensor.from_local(
            local, ctx.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return whole.redistribute(placements=ctx.placements), None, None


# --- agreement of ranks --------------------------------------------------------------------------------

_calls: Counter[str] = Counter()
_SHORTEST, _LONGEST = 0.001, 0.1  # seconds between two polls of the store
_NOTES = "_lora_fx_whole"


def called_by_all(tensors: Iterable[Tensor], purpose: str, word: str = "") -> dict[int, str]:
    """Wait until every rank that holds parts of some tensors has made this call, too.

    Otherwise a collective of one rank could be matched with a different one of another rank. Return at once
    if no tensor is sharded.

    Args:
        tensors: The tensors that are gathered afterwards.
        purpose: Purpose of the call, for the error message.
        word: Text that this rank sends to the others.

    Returns:
        The text of each rank, by rank.

    Raises:
        ProcessError: If ranks are missing after the timeout of the process group. The message names them.
    """
    ranks = _holders(tensors)
    if len(ranks) < 2:
        return {}
    import torch.distributed as dist

    store = torch_private.group_store()
    prefix = f"lora_fx {purpose} {ranks}"
    number = _calls[prefix]
    keys = {rank: f"{prefix} {number} {rank}" for rank in ranks}
    mine = dist.get_rank()
    store.set(keys[mine], word)
    end, pause = time.monotonic() + store.timeout.total_seconds(), _SHORTEST
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if time.monotonic() > end:
            # A later call must start from the same state as on the other ranks.
            store.delete_key(keys[mine])
            raise ProcessError(
                f"{purpose}: every process that holds a part has to call this, and rank "
                f"{', '.join(map(str, missing))} has ended, or has not called this within the timeout of the "
                "process group (init_process_group(timeout=...)). Call it on every rank, not on the first "
                "alone: that one writes. Else look for the first error of the others, and start all again"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    words = {rank: bytes(store.get(key)).decode() for rank, key in keys.items()} if word else {}
    _calls[prefix] = number + 1
    if number:
        # All ranks have left the previous call.
        store.delete_key(f"{prefix} {number - 1} {mine}")
    return words


def _holders(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return the ranks that hold parts of some tensors; none if there is no real process group."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() == "fake":
        return ()
    meshes: dict[int, Any] = {}
    groups: dict[int, Any] = {}
    for tensor in tensors:
        value: Any = tensor
        if _is_sharded(value):
            meshes[id(value.device_mesh)] = value.device_mesh
        elif hasattr(value, "ds_process_group"):  # of DeepSpeed's ZeRO-3
            groups[id(value.ds_process_group)] = value.ds_process_group
    ranks = {rank for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist()}
    ranks |= {rank for group in groups.values() for rank in dist.get_process_group_ranks(group)}
    return tuple(sorted(ranks))


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def note_whole(module: nn.Module, name: str, value: Any) -> None:
    """Record a digest of a factor that is about to be sharded (``fully_shard``), for :func:`check_equal`.

    Args:
        module: The module with the factor.
        name: Name of the factor.
        value: The ``DTensor`` that will replace it.
    """
    if not _is_sharded(value):
        return
    whole = module._parameters.get(name)
    notes = vars(module).setdefault(_NOTES, {})
    if whole is None or name in notes or _is_sharded(whole):
        return
    notes[name] = (_digest(whole), value, _version(value))


def _digest(whole: Tensor) -> str:
    digest = hashlib.blake2b(f"{list(whole.shape)} {whole.dtype}".encode(), digest_size=8)
    try:
        add_values(digest, whole)
    except (NotImplementedError, RuntimeError):  # meta and fake tensors have no values
        return _UNKNOWN
    return digest.hexdigest()


_UNKNOWN = "?"


def _version(value: Any) -> int:
    """Return a count of writes to a tensor. A ``DTensor`` and its local tensor have separate counters."""
    return torch_private.version_counter(value) + torch_private.version_counter(
        torch_private.local_tensor(value)
    )


def check_equal(model: nn.Module) -> None:
    """Raise if ranks had different factors when FSDP2 sharded them. Runs once.

    Each rank cuts its shard from its own factors, so training would use a mixture of them. Factors that were
    modified after the sharding, or had no values, count as equal.

    Raises:
        ConfigError: On every rank, with the first factor that differs.
        ProcessError: If a rank does not make this call.
        QuantizationError: With the first adapted weight that FSDP2 has sharded without its scales.
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
        # Keep the names, so that note_whole skips them: FSDP2 registers a sharded factor again at each call.
        for name in vars(module).get(_NOTES, ()):
            vars(module)[_NOTES][name] = None
    digests = {rank: json.loads(word) for rank, word in several.items()}
    first = min(digests, default=0)
    for rank, theirs in digests.items():
        for name in (*digests[first], *theirs):
            pair = digests[first].get(name), theirs.get(name)
            if pair[0] != pair[1] and _UNKNOWN not in pair:
                raise ConfigError(
                    f"{name}: on rank {rank} it was another one than on rank {first} when fully_shard cut "
                    "it, so that what is trained would be a mixture: give every process the same "
                    "configuration, and load the same folder"
                )
    _restore_scales(model)


def _restore_scales(model: nn.Module) -> None:
    """Add hooks that restore the scales of packed weights, which FSDP2 has sharded without them. Runs once.

    Raises:
        QuantizationError: With the first adapted weight whose scales are lost.
    """
    for module in model.modules():
        for known in formats():
            hook = known.layers.scales_hook(module)
            if hook is not None:
                module.register_forward_pre_hook(hook)
    record = record_of(model)
    adapters = record.adapters.values() if record is not None else ()
    for site in (row.site for adapter in adapters for row in adapter.sites):
        owner = model.get_submodule(site.owner)
        weight = owner._parameters.get(site.parameter)
        if site.quantized is None or not _is_sharded(weight) or _has_scales(owner, weight):
            continue
        raise QuantizationError(
            f"{site.weight} is stored as {site.quantized}, and FSDP2 has sharded its values or bytes without "
            f"their scales: {WHOLE_WEIGHTS}"
        )


def _has_scales(owner: nn.Module, weight: Any) -> bool:
    if quantization_of(torch_private.local_tensor(weight)) is not None:
        return True
    return any(known.layers.scales_hook(owner) is not None for known in formats())


def _noted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for fqn, module in model.named_modules():
        for name, note in vars(module).get(_NOTES, {}).items():
            if note is not None:
                yield f"{fqn}.{name}", note
