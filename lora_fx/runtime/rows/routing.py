"""Arrow (arXiv:2405.11157): each token is routed to the adapters whose directions its input is closest to.

The direction of an adapter, its *prototype*, is the first right singular vector of ``B A``. With GenKnowSub
(ACL 2025 short 54) the mean of general adapters is subtracted from each factor before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lora_fx import torch_private

__all__ = ["prototype", "routed"]

_STEPS: Final = 15
_EPS: Final = 1e-8

_known: Any = WeakIdKeyDictionary()
"""Prototypes by the A of their adapter, with the state of all factors that they were computed from."""


def prototype(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """Return the first right singular vector of ``B A``, up to its sign, by PEFT's power iteration.

    Args:
        a: [r, in].
        b: [out, r].
        seed: Seeds the first vector.

    Returns:
        [in], in the dtype of ``a``.
    """
    down, up = a.detach().float(), b.detach().float()
    gram = up.T @ up
    v: Tensor = _first_vector(a.shape[1], seed, a.device)
    for _ in range(_STEPS):
        w = down.T @ (gram @ (down @ v))
        v = w / (w.norm() + _EPS)
    return v.to(a.dtype)


@torch_private.make_constant
def _first_vector(size: int, seed: int, device: torch.device) -> Tensor:
    """Return the vector, [size], from which PEFT starts the power iteration."""
    generator = torch.Generator(device=device).manual_seed(seed)
    v = torch.randn(size, dtype=torch.float32, device=device, generator=generator)
    vector: Tensor = v / (v.norm() + _EPS)
    return vector


def routed(
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    general: tuple[Sequence[Tensor], Sequence[Tensor]],
    top_k: int,
    temperature: float,
    seed: int,
) -> Tensor:
    """Return the sum of the adapters' outputs, weighted for each token by a softmax over its best adapters.

    Args:
        x: [..., in].
        downs: The A of each adapter, [r, in].
        ups: The B of each adapter, [out, r].
        scales: The scale of each adapter.
        general: The A and the B of the general adapters, whose means are subtracted; empty for none.
        top_k: The number of adapters of a token.
        temperature: The temperature of the softmax.
        seed: Seeds the prototypes.

    Returns:
        [..., out].
    """
    sources = list(zip(downs, ups, strict=True))
    pairs = sources
    if general[0]:
        less_a, less_b = (torch.stack(list(factors)).mean(0) for factors in general)
        pairs = [(a - less_a, b - less_b) for a, b in sources]
    state = [*downs, *ups, *general[0], *general[1]]
    prototypes = torch.stack(
        [
            _cached(source, pair, seed, state)
            for (source, _), pair in zip(sources, pairs, strict=True)
        ]
    )
    x = x.to(downs[0].dtype)
    similarity = (x @ prototypes.T).abs()
    best, index = similarity.topk(top_k, dim=-1)
    scores = torch.full_like(similarity, float("-inf")).scatter(-1, index, best)
    weights = torch.softmax(scores / temperature, dim=-1)
    outputs = [
        torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
        * scale
        * weights[..., i : i + 1]
        for i, ((a, b), scale) in enumerate(zip(pairs, scales, strict=True))
    ]
    return torch.stack(outputs).sum(0)


def _cached(
    source: Tensor, pair: tuple[Tensor, Tensor], seed: int, state: Sequence[Tensor]
) -> Tensor:
    """Return a prototype from the cache. Compute it again if a factor has changed."""
    if torch.compiler.is_compiling() or torch_private.is_fake(source) or source.is_inference():
        return prototype(*pair, seed)
    versions = tuple((id(factor), torch_private.version_counter(factor)) for factor in state)
    key = (seed, versions)
    known = _known.get(source)
    if known is None or known[0] != key:
        known = _known[source] = (key, prototype(*pair, seed))
    vector: Tensor = known[1]
    return vector
