"""How the fused functions are called: in which dtype, and as what under autograd and its transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.runtime.masks import transformed

__all__ = [
    "add_product",
    "apply",
    "autocast_dtype",
    "cast",
    "flat",
    "without_autocast",
]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a kind of device; None where it is off."""
    # There is none on the meta device, and asking for it is an error.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does it, which leaves fp64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Takes autocast off where it is on: what is computed inside has its dtype already.

    In a backward, too: who enters it for that alone would have products in its dtype added to others.
    """
    if autocast_dtype(kind) is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def apply(
    function: type[torch.autograd.Function],
    plain: Callable[..., tuple[Tensor, ...]],
    given: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """The outputs of an autograd function but the last, which is what it keeps for the backward.

    Args:
        function: It has ``setup_context``.
        plain: The same outputs of plain operations, with nothing in place: under the transforms of
            ``torch.func``, since vmap cannot write a batch into what has none, and for a sparse x, which has
            few operations.
        given: The arguments of both, x before all others.
    """
    compiling = torch.compiler.is_compiling()
    if transformed() or given[0].layout is not torch.strided:
        return plain(*given)
    if compiling and not _wanted(given):
        # Dynamo does not trace a function that has no gradient to compute.
        return plain(*given)
    if not torch.is_grad_enabled():
        return tuple(function.forward(*given)[:-1])
    call: Any = function.apply
    if not compiling:
        # The same without a look for default values at forward's signature, which takes longer than forward.
        base: Any = super(torch.autograd.Function, function)
        call = base.apply
    return tuple(call(*given)[:-1])


def _wanted(given: tuple[Any, ...]) -> bool:
    """Whether anything in a call has a gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(one, Tensor) and one.requires_grad for one in given)


def flat(x: Tensor) -> Tensor:
    """A matrix of the vectors of the last dimension, [tokens, features]."""
    return x.reshape(-1, x.shape[-1])


def add_product(
    total: Tensor | None,
    left: Tensor,
    right: Tensor,
    again: bool,
    factor: Tensor | None = None,
) -> Tensor:
    """``total + factor ∘ (left @ right)``.

    Args:
        total: None for zero.
        left: [n, k].
        right: [k, m].
        again: Whether this is differentiated again: then the total may not be written into.
        factor: [n, m], only where there is a total.
    """
    if total is None:
        return left @ right
    if factor is not None:
        product = left @ right
        return torch.addcmul(total, product, factor) if again else total.addcmul_(product, factor)
    return torch.addmm(total, left, right) if again else total.addmm_(left, right)
