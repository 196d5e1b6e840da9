"""Branches over tensors that processes hold in parts (``DTensor``): of tensor parallelism, and of FSDP2.

The factors lie as the weight does. Cut along its outputs, B is cut along its own, and A is whole in each
process; cut along its inputs, A is cut along them, and B is whole. Then ``x Aᵀ Bᵀ`` comes out as ``x Wᵀ``
does, in parts or as terms of a sum, and nothing more is sent in a forward. The gradient of a factor that is
whole is a sum over the processes, or the mean over those that have other samples. What an adapter has for
each output feature besides (a magnitude, a bias) is cut as B is. Norms of weights are sums over the inputs:
where those are cut, each forward sums one vector over the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ConfigError

__all__ = [
    "check_not_in_parts",
    "compute_in_parts",
    "factor_beside",
    "is_in_parts",
    "own_part",
    "slot_beside",
    "summed_over_inputs",
]


def is_in_parts(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return type(tensor) is not Tensor and hasattr(tensor, "_local_tensor")


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
    found: Tensor = tensor._local_tensor if is_in_parts(tensor) else tensor
    return found.detach()


def summed_over_inputs(sums: Tensor, a: Any) -> Tensor:
    """Sums that go over the inputs of a layer, from those over the inputs of each process.

    Args:
        sums: [out], or this process's part of it.
        a: The factor A, which is cut as the inputs are: nothing is sent where it is whole.
    """
    from torch.distributed._functional_collectives import all_reduce

    for place, placement in enumerate(a.placements):
        if placement.is_shard():
            sums = all_reduce(sums, "sum", (a.device_mesh, place))
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
        local = factor._local_tensor
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
        local = grad._local_tensor if is_in_parts(grad) else grad
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
