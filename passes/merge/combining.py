r"""One adapter from several of the same site: ``ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ``, or what comes close at a lower rank.

The ways are those of PEFT's ``add_weighted_adapter``, and so are the results. They work on

- the factors side by side (``cat``): exact, and the rank is the sum of the ranks;
- the factors one by one (``linear`` and those that prune before it): ``A = Σ ±√|wᵢ sᵢ| Aᵢ`` and
  ``B = Σ √|wᵢ sᵢ| Bᵢ``, which has products of one adapter's A with another's B in it;
- the changes ``sᵢ Bᵢ Aᵢ`` (``svd`` and what ends in it): the closest ``B A`` of a rank
  (Eckart and Young 1936).

The result has a scale of 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from lora_fx.errors import ConfigError
from lora_fx.ir.values import Layout
from lora_fx.passes.merge.combination import Combination
from lora_fx.passes.merge.pruning import (
    average_of_majority,
    keep_largest,
    keep_random,
    weighted_sum,
)

__all__ = ["Term", "combine"]


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """What one adapter contributes at a site.

    Attributes:
        a: A [r, in, *k], or [E, r, in] for experts.
        b: B [out, r, 1, ...] or [E, out, r]; [out, r/g, 1, ...] for a convolution with g groups.
        scale: The adapter's own scale, ``alpha / r``.
        weight: How much of it; may be negative.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: float


def combine(
    terms: Sequence[Term],
    how: Combination,
    *,
    groups: int = 1,
    experts: bool = False,
    layout: Layout = "out_in",
    where: str = "",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the combination, whose own scale is 1.

    Args:
        terms: The adapters that have the site, at least one, on one device.
        how: What to do with them.
        groups: Groups of a convolution: B belongs to them block by block.
        experts: Whether A and B have a matrix for each expert.
        layout: How the weight is stored. It decides for which element a random number is drawn where
            elements of ``B A`` are dropped, and nothing else.
        where: FQN of the site, for errors.
        generator: Where ``dare`` draws from; torch's own by default. It draws once a tensor in the order
            of the terms, for all A and then for all B, or for all ``B A``: PEFT's order.

    Returns:
        A and B, shaped as the terms' with the rank of the result, and new.

    Raises:
        ConfigError: If there are no terms, they are of different shapes, weights or factors are not
            finite, ranks differ where they must not, the groups do not divide the rank, or there is a
            driver for tensors that are not on CUDA.
    """
    place = f"{where}: " if where else ""
    _check(terms, how, groups, int(experts), place)
    if experts:
        pairs = [(term.a, term.b) for term in terms]
    else:
        pairs = [(_by_group(t.a, groups), _by_group(t.b, groups)) for t in terms]
    if how.kind == "cat":
        a, b = _side_by_side(terms, pairs)
    elif how.by_product:
        rank = how.svd_rank or max(a.shape[1] for a, _ in pairs) * groups
        a, b = _from_products(terms, pairs, how, rank // groups, layout, generator)
    else:
        a, b = _one_by_one(terms, pairs, how, generator)
    if experts:
        return a, b
    like = terms[0]
    return (
        a.reshape(-1, *like.a.shape[1:]).contiguous(),
        b.reshape(like.b.shape[0], -1, *like.b.shape[2:]).contiguous(),
    )


# One matrix for each expert or group, or one for all: A [G, r, n] and B [G, m, r].
_Pair = tuple[torch.Tensor, torch.Tensor]


def _by_group(factor: torch.Tensor, groups: int) -> torch.Tensor:
    return factor.reshape(groups, factor.shape[0] // groups, -1)


def _check(terms: Sequence[Term], how: Combination, groups: int, axis: int, place: str) -> None:
    if not terms:
        raise ConfigError(f"{place}there is no adapter to combine; name at least one")
    for term in terms:
        if not math.isfinite(term.weight * term.scale):
            found = f"found a weight of {term.weight} at a scale of {term.scale}"
            raise ConfigError(f"{place}{found}; give finite numbers")
        if not (torch.isfinite(term.a).all() and torch.isfinite(term.b).all()):
            raise ConfigError(f"{place}an adapter has factors that are not finite; leave it out")
        if how.svd_driver is not None and not term.a.is_cuda:
            raise ConfigError(
                f"{place}svd_driver={how.svd_driver!r} is one of cuSOLVER's, and the adapter is on "
                f"{term.a.device}; leave it out"
            )
    shapes = {_without_rank(term, axis): None for term in terms}
    if len(shapes) > 1:
        found = "; ".join(f"A {list(a)}, B {list(b)}" for a, b in shapes)
        raise ConfigError(f"{place}the adapters are of different shapes beside the rank: {found}")
    ranks = [term.a.shape[axis] for term in terms]
    if how.needs_equal_ranks and len(set(ranks)) > 1:
        raise ConfigError(
            f"{place}combination_type={how.kind!r} adds factors of one rank, found {ranks}: use 'cat', "
            "'svd' or a type that ends in 'svd'"
        )
    if how.by_product and (how.svd_rank or 0) % groups:
        raise ConfigError(
            f"{place}a convolution with {groups} groups needs a rank that they divide, not {how.svd_rank}"
        )


def _without_rank(term: Term, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = list(term.a.shape), list(term.b.shape)
    del a[axis], b[axis + 1]
    return tuple(a), tuple(b)


def _side_by_side(terms: Sequence[Term], pairs: Sequence[_Pair]) -> _Pair:
    """``[A₁; A₂]`` and ``[B₁ B₂]``; weight and scale go into A."""
    a = [a * (t.weight * t.scale) for (a, _), t in zip(pairs, terms, strict=True)]
    return torch.cat(a, 1), torch.cat([b for _, b in pairs], 2)


def _one_by_one(
    terms: Sequence[Term],
    pairs: Sequence[_Pair],
    how: Combination,
    generator: torch.Generator | None,
) -> _Pair:
    scaled = [term.weight * term.scale for term in terms]
    roots = [math.sqrt(abs(value)) for value in scaled]
    # The sign goes to one side: on both it would be lost in the product.
    signed = [-root if value < 0 else root for root, value in zip(roots, scaled, strict=True)]
    a = _mixed([a for a, _ in pairs], signed, how, generator)
    return a, _mixed([b for _, b in pairs], roots, how, generator)


def _from_products(
    terms: Sequence[Term],
    pairs: Sequence[_Pair],
    how: Combination,
    rank: int,
    layout: Layout,
    generator: torch.Generator | None,
) -> _Pair:
    """The closest product of a rank, by the SVD of what the changes combine to."""
    rank = min(rank, pairs[0][0].shape[2], pairs[0][1].shape[1])
    if how.kind == "svd" and how.svd_clamp is None and rank <= sum(a.shape[1] for a, _ in pairs):
        return _closest_to_sum(*_side_by_side(terms, pairs), rank)
    deltas = [(b @ a) * t.scale for (a, b), t in zip(pairs, terms, strict=True)]
    stored = [delta.mT for delta in deltas] if layout == "in_out" else deltas
    mixed = _mixed(stored, [term.weight for term in terms], how, generator)
    u, values, vh = torch.linalg.svd(
        mixed.mT if layout == "in_out" else mixed,
        full_matrices=how.svd_full_matrices,
        driver=how.svd_driver,
    )
    b, a = u[..., :rank] * values[..., None, :rank], vh[..., :rank, :]
    if how.svd_clamp is not None:
        # A quantile of all elements of both with their signs, as in PEFT.
        limit = torch.cat([b.flatten(), a.flatten()]).quantile(how.svd_clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b


def _closest_to_sum(a: torch.Tensor, b: torch.Tensor, rank: int) -> _Pair:
    """The truncated SVD of ``B A`` from that of a matrix as small as the rank of both.

    With ``B = Q R`` and ``Aᵀ = P S`` it is ``Q (R Sᵀ) Pᵀ``. Nothing of the size of the weight is built,
    nor the square matrix as wide as a vocabulary that a full SVD of an embedding's change would be.
    """
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
    return vh[..., :rank, :] @ p.mT, q @ (u[..., :rank] * values[..., None, :rank])


def _mixed(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    how: Combination,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """One tensor of several and their weights."""
    if how.density is not None and how.kind.startswith("dare"):
        tensors = [keep_random(one, how.density, generator) for one in tensors]
    elif how.density is not None and how.prunes:
        tensors = [keep_largest(one, how.density) for one in tensors]
    if "ties" in how.kind:
        return average_of_majority(tensors, weights, how.majority_sign_method)
    return weighted_sum(tensors, weights)
