"""A new adapter as the weighted combination of adapters of a model.

Each site is combined separately, to ``ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ`` or an approximation of lower rank. The new
adapter is then added as if it were loaded, with these values.

The methods and their results are those of PEFT's ``add_weighted_adapter``. They work on

- the concatenated factors (``cat``): exact, and the rank is the sum of the ranks;
- each factor separately (``linear`` and the methods that prune before it): ``A = Σ ±√|wᵢ sᵢ| Aᵢ`` and
  ``B = Σ √|wᵢ sᵢ| Bᵢ``. The result contains products of one adapter's A with another's B;
- the changes ``sᵢ Bᵢ Aᵢ`` (names that end in ``svd``): the closest ``B A`` of a rank (Eckart and Young
  1936).

The result has a scale of 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_names, adapter_record, delete_adapter, put_adapter
from lora_fx.adapters.settings import by_site, written_config
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import AdapterRecord, Layout, PlannedSite
from lora_fx.kinds import chosen_kind, is_plain
from lora_fx.passes.parameters import (
    agreed,
    factors_of,
    gathered,
    inside,
    own_value,
    weight_at,
    write,
)
from lora_fx.runtime.modules import check_adapter_name

__all__ = [
    "COMBINATIONS",
    "Combination",
    "CombinationType",
    "Election",
    "Part",
    "Source",
    "SvdDriver",
    "Term",
    "add_weighted_adapter",
    "combine",
]

# --- combinations of matrices ---------------------------------------------------------------------


Election = Literal["total", "frequency"]
"""The way to elect a sign: the sum of the values, or the number of positive against negative values."""


def _keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Set all elements to zero except the ``⌊density · n⌋`` of the largest magnitude."""
    count = int(density * tensor.numel())
    kept = tensor.abs().flatten().topk(count).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[kept] = True
    return tensor.where(mask.view(tensor.shape), 0)


def _keep_random(
    tensor: torch.Tensor, density: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Keep each element with probability ``density`` and divide it by that (DARE).

    Args:
        tensor: Any shape.
        density: In (0, 1].
        generator: The random generator; torch's own by default.
    """
    # Draw nothing if nothing can be dropped, so that later draws stay the same.
    if density == 1:
        return tensor
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * kept / density


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return ``Σ wᵢ Tᵢ``."""
    return (torch.stack(tuple(tensors)) * _column(weights, tensors[0])).sum(0)


def _average_of_majority(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], election: Election
) -> torch.Tensor:
    """Return the mean of the weighted elements that have the elected sign; 0 if no element has it.

    The sign is elected without the weights, and a tie elects the positive sign.
    """
    stack = torch.stack(tuple(tensors))
    votes = (stack if election == "total" else stack.sign()).sum(0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    chosen = (stack * _column(weights, stack[0])).where(agrees, 0).sum(0)
    return chosen / agrees.sum(0).clamp_min(1)


def _column(weights: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(weights, dtype=like.dtype, device=like.device)
    return values.view(-1, *(1 for _ in like.shape))


CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
COMBINATIONS: Final = get_args(CombinationType)
"""The ways to combine, by PEFT's names."""

SvdDriver = Literal["gesvd", "gesvdj", "gesvda"]
_DRIVERS: Final = (None, *get_args(SvdDriver))


@dataclasses.dataclass(frozen=True)
class Combination:
    """A method to combine adapters. The fields are PEFT's and validated on construction.

    Attributes:
        kind: One of :data:`COMBINATIONS`.
        svd_rank: For kinds that end in ``svd``: the rank; by default the largest rank of the adapters.
        svd_clamp: For the same kinds: a quantile in (0, 1] beyond which elements of A and B are clamped.
        svd_full_matrices, svd_driver: For the same: passed to ``torch.linalg.svd``.
        density: For kinds that prune: the share of the elements to keep, in (0, 1].
        majority_sign_method: For kinds with ``ties``: ``total`` if the sum of the values elects the sign,
            ``frequency`` if the number of signs does.

    Raises:
        ConfigError: If a field is not valid, or a density is needed and missing.
    """

    kind: CombinationType = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: SvdDriver | None = None
    density: float | None = None
    majority_sign_method: Election = "total"

    def __post_init__(self) -> None:
        if self.kind not in COMBINATIONS:
            near = difflib.get_close_matches(str(self.kind), COMBINATIONS) or COMBINATIONS
            raise _bad("combination_type", self.kind, f"nearest: {', '.join(map(repr, near))}")
        rank = self.svd_rank
        if rank is not None and not _is_rank(rank):
            raise _bad("svd_rank", rank, "a rank is a whole number of at least 1")
        if self.svd_clamp is not None and not _is_share(self.svd_clamp):
            raise _bad("svd_clamp", self.svd_clamp, "it is a quantile: above 0 and at most 1")
        if self.svd_driver not in _DRIVERS:
            raise _bad("svd_driver", self.svd_driver, f"the drivers are {_DRIVERS}")
        if self.majority_sign_method not in get_args(Election):
            remedy = f"the methods are {get_args(Election)}"
            raise _bad("majority_sign_method", self.majority_sign_method, remedy)
        if self.prunes and not _is_share(self.density):
            remedy = f"{self.kind!r} keeps a share of the elements: above 0 and at most 1"
            raise _bad("density", self.density, remedy)

    @property
    def prunes(self) -> bool:
        """True if elements are dropped before the tensors are added."""
        return self.kind.startswith(("ties", "dare", "magnitude"))

    @property
    def by_product(self) -> bool:
        """True if the method combines the products ``B A`` and factors the result."""
        return self.kind.endswith("svd")

    def among(self, adapters: int) -> Combination:
        """Return the method to use for this number of adapters: one adapter is only weighted, as in PEFT."""
        return self if adapters > 1 else Combination("linear")

    @property
    def needs_equal_ranks(self) -> bool:
        """True if factors of different adapters are added element by element."""
        return self.kind != "cat" and not self.by_product


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1


def _bad(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name}: found {value!r}; {remedy}")


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """The contribution of an adapter to a site.

    Attributes:
        a: A [r, in, *k], or [E, r, in] for experts.
        b: B [out, r, 1, ...] or [E, out, r]; [out, r/g, 1, ...] for a convolution with g groups.
        scale: The adapter's own scale, ``alpha / r``.
        weight: The weight of the adapter in the combination; may be negative.
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
    """Return A and B of the combination, whose scale is 1.

    Args:
        terms: The adapters that have the site, at least one, on the same device.
        how: The method.
        groups: Number of groups of a convolution; B then consists of a block for each.
        experts: True if A and B have a matrix for each expert.
        layout: The layout of the stored weight. It matters only if elements of ``B A`` are dropped: it
            decides which random number each element gets.
        where: FQN of the site, for errors.
        generator: The random generator for ``dare``; torch's own by default. It draws once for each tensor in
            PEFT's order: all A and then all B in the order of the terms, or all ``B A``.

    Returns:
        New A and B with the shapes of the terms', and the rank of the result.

    Raises:
        ConfigError: If there are no terms or their shapes differ, or weights or factors are not finite. If
            ranks differ although the method needs equal ranks, or the groups do not divide the rank. If there
            is a driver for tensors that are not on CUDA.
    """
    for objection in _method_objections(terms, how, groups, int(experts)):
        raise ConfigError(f"{where}: {objection}" if where else objection)
    if experts:
        pairs = [(term.a, term.b) for term in terms]
    else:
        pairs = [(_by_group(t.a, groups), _by_group(t.b, groups)) for t in terms]
    if how.kind == "cat":
        a, b = _concatenated(terms, pairs)
    elif how.by_product:
        rank = how.svd_rank or max(a.shape[1] for a, _ in pairs) * groups
        a, b = _from_products(terms, pairs, how, rank // groups, layout, generator)
    else:
        a, b = _by_factors(terms, pairs, how, generator)
    if experts:
        return a, b
    like = terms[0]
    return (
        a.reshape(-1, *like.a.shape[1:]).contiguous(),
        b.reshape(like.b.shape[0], -1, *like.b.shape[2:]).contiguous(),
    )


# A matrix for each expert or group, or a single matrix (G = 1): A [G, r, n] and B [G, m, r].
_Pair = tuple[torch.Tensor, torch.Tensor]


def _by_group(factor: torch.Tensor, groups: int) -> torch.Tensor:
    return factor.reshape(groups, factor.shape[0] // groups, -1)


def _method_objections(
    terms: Sequence[Term], how: Combination, groups: int, axis: int
) -> Iterator[str]:
    """Yield the reasons why the adapters cannot be combined with this method."""
    if not terms:
        yield "there is no adapter to combine; name at least one"
    for term in terms:
        if not math.isfinite(term.weight * term.scale):
            text = f"found a weight of {term.weight} at a scale of {term.scale}"
            yield f"{text}; give finite numbers"
        if not (torch.isfinite(term.a).all() and torch.isfinite(term.b).all()):
            yield "an adapter has factors that are not finite; leave it out"
        if how.svd_driver is not None and not term.a.is_cuda:
            yield (
                f"svd_driver={how.svd_driver!r} is one of cuSOLVER's, and the adapter is on "
                f"{term.a.device}; leave it out"
            )
    shapes = {_without_rank(term, axis): None for term in terms}
    if len(shapes) > 1:
        text = "; ".join(f"A {list(a)}, B {list(b)}" for a, b in shapes)
        yield f"the adapters are of different shapes beside the rank: {text}"
    ranks = [term.a.shape[axis] for term in terms]
    if how.needs_equal_ranks and len(set(ranks)) > 1:
        yield (
            f"combination_type={how.kind!r} adds factors of one rank, found {ranks}: use 'cat', 'svd' or a "
            "type that ends in 'svd'"
        )
    if how.by_product and (how.svd_rank or 0) % groups:
        yield f"a convolution with {groups} groups needs a rank that they divide, not {how.svd_rank}"


def _without_rank(term: Term, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = list(term.a.shape), list(term.b.shape)
    del a[axis], b[axis + 1]
    return tuple(a), tuple(b)


def _concatenated(terms: Sequence[Term], pairs: Sequence[_Pair]) -> _Pair:
    """Return ``[A₁; A₂]`` and ``[B₁ B₂]``; weight and scale go into A."""
    a = [a * (t.weight * t.scale) for (a, _), t in zip(pairs, terms, strict=True)]
    return torch.cat(a, 1), torch.cat([b for _, b in pairs], 2)


def _by_factors(
    terms: Sequence[Term],
    pairs: Sequence[_Pair],
    how: Combination,
    generator: torch.Generator | None,
) -> _Pair:
    scaled = [term.weight * term.scale for term in terms]
    roots = [math.sqrt(abs(value)) for value in scaled]
    # Only one factor gets the sign: in both it would cancel in the product.
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
    """Return the closest product of a rank, by the SVD of the combined changes."""
    rank = min(rank, pairs[0][0].shape[2], pairs[0][1].shape[1])
    if how.kind == "svd" and how.svd_clamp is None and rank <= sum(a.shape[1] for a, _ in pairs):
        return _closest_to_sum(*_concatenated(terms, pairs), rank)
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
        # As in PEFT, take the quantile over the elements of A and B together, with their signs.
        limit = torch.cat([b.flatten(), a.flatten()]).quantile(how.svd_clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b


def _closest_to_sum(a: torch.Tensor, b: torch.Tensor, rank: int) -> _Pair:
    """Return the truncated SVD of ``B A``, from the SVD of a matrix as small as the total rank.

    With ``B = Q R`` and ``Aᵀ = P S`` it is ``Q (R Sᵀ) Pᵀ``. This builds nothing of the size of the weight. A
    full SVD of an embedding's change would even build a square matrix as wide as the vocabulary.
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
    """Return the weighted combination of tensors, after the method has dropped elements of each."""
    if how.density is not None and how.kind.startswith("dare"):
        tensors = [_keep_random(tensor, how.density, generator) for tensor in tensors]
    elif how.density is not None and how.prunes:
        tensors = [_keep_largest(tensor, how.density) for tensor in tensors]
    if "ties" in how.kind:
        return _average_of_majority(tensors, weights, how.majority_sign_method)
    return _weighted_sum(tensors, weights)


# --- the new adapter ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter that is combined with others, and its weight in the sum."""

    name: str
    weight: float
    record: AdapterRecord


Part = tuple[Source, PlannedSite]
"""A source and one of its sites."""


def _sources_of(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float]
) -> tuple[Source, ...]:
    """Return the adapters by name, if they can be combined.

    Raises:
        ConfigError: If the model has no such adapter, a weight is not a finite number, or the adapters cannot
            be added.
    """
    if isinstance(adapters, str):
        raise ConfigError(f"adapters: found {adapters!r}; give a list of names")
    names, shares = tuple(adapters), tuple(weights)
    if not names:
        raise ConfigError("adapters: found none; name at least one adapter to combine")
    if len(names) != len(shares):
        raise ConfigError(
            f"weights: found {len(shares)} for {len(names)} adapter(s); give each a weight"
        )
    for name, weight in zip(names, shares, strict=True):
        if not _is_finite(weight):
            raise ConfigError(f"weights: found {weight!r} for {name!r}; give a finite number")
    if len(set(names)) != len(names):
        raise ConfigError(f"adapters: one is named twice in {list(names)}; add up its weights")
    sources = tuple(
        Source(name, float(weight), adapter_record(model, name))
        for name, weight in zip(names, shares, strict=True)
    )
    owners: dict[str, str] = {}
    for source in sources:
        for objection in _objections(source):
            raise ConfigError(f"adapter {source.name!r} cannot be combined: {objection}")
        for own in source.record.own:
            if owners.setdefault(own, source.name) != source.name:
                raise ConfigError(
                    f"{owners[own]!r} and {source.name!r} both train {own} in full (modules_to_save): "
                    "there is no sum of these; combine adapters of which one at most does"
                )
    return sources


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _objections(source: Source) -> Iterator[str]:
    """Yield the reasons why an adapter has no weighted sum, such as tensors other than A and B."""
    config, record = source.record.config, source.record
    if not is_plain(config) or config.trainable_token_indices:
        name = "trainable_token_indices" if is_plain(config) else chosen_kind(config).field
        yield f"of {name}={getattr(config, name)!r} there is no weighted sum"
    if not record.initialized:
        yield (
            f"init_lora_weights={config.init_lora_weights!r} waits for data; give it its start with "
            "lora_fx.initialize"
        )
    if record.biases:
        yield f"it trains biases of the base (bias={config.bias!r}), and one adapter at most can"
    if record.given:
        yield (
            f"its folder had other values of {', '.join(record.given)} than the model: give the model those "
            "first"
        )
    changed = {row.site.weight for row in record.sites} & set(record.own)
    if changed:
        yield (
            f"its initialization ({config.init_lora_weights!r}) changed {min(changed)}; save it and load it "
            "again, which makes it one of the base's own weights"
        )


def _keeps_tied(sources: Sequence[Source]) -> bool:
    """Return True if the combination keeps heads tied: every source that adapts a head or embedding does."""
    heads = {row.name for source in sources for row in source.record.sites if row.tied}
    flags = [source.record.config.ensure_weight_tying for source in sources]
    touches = [
        any(row.name in heads or row.site.family == "embedding" for row in source.record.sites)
        for source in sources
    ]
    return any(flags) and all(flag or not any_ for flag, any_ in zip(flags, touches, strict=True))


def _parts_of(sources: Sequence[Source], tied: bool) -> dict[str, list[Part]]:
    """Group the sites of all sources by name, without the heads that stay tied to an embedding.

    Raises:
        ConfigError: If a site is part of another.
    """
    parts_by_site: dict[str, list[Part]] = {}
    for source in sources:
        for row in source.record.sites:
            if not (tied and row.tied):
                parts_by_site.setdefault(row.name, []).append((source, row))
    for name, parts in parts_by_site.items():
        source, row = parts[0]
        if row.site.part_of in parts_by_site:
            other = parts_by_site[row.site.part_of][0][0]
            raise ConfigError(
                f"{name} is adapted by {source.name!r}, and as part of {row.site.part_of} by "
                f"{other.name!r}: a part and its whole cannot be combined"
            )
    return parts_by_site


@inside
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: SvdDriver | None = None,
    density: float | None = None,
    majority_sign_method: Election = "total",
) -> nn.Module:
    """Combine adapters into a new one.

    The new adapter stays inactive until you activate it with :func:`lora_fx.set_adapter`.

    It covers every site of the adapters. A site that only some adapters have is combined from those. A module
    that one of them trains in full (``modules_to_save``) is copied. A single adapter is only weighted,
    whatever the type. The new scale is 1; dropout and task type are those of the first adapter.

    Args:
        model: A rewritten model, changed in place.
        adapters: Names of adapters of the model.
        weights: A weight for each adapter; negative weights subtract.
        adapter_name: Name of the new adapter.
        combination_type: ``cat`` is exact, and its rank is the sum of the ranks. ``svd`` is the closest
            approximation of a rank. ``linear`` adds the factors, which is fast but not the sum. ``ties``,
            ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` drop elements first. With ``_svd`` appended
            they work on the change of the weight instead of the factors.
        svd_rank: For types with ``svd``: the rank, by default the largest rank of the adapters.
        svd_clamp: For the same types: the quantile at which elements of the new factors are clamped.
        svd_full_matrices: For the same types: passed to ``torch.linalg.svd``.
        svd_driver: For the same types: passed to ``torch.linalg.svd``; on CUDA only.
        density: For types that drop elements: the share to keep, in (0, 1].
        majority_sign_method: For types with ``ties``: ``total`` or ``frequency``.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a name is unknown or taken, an argument is not valid, or several of the adapters train
            the same module in full. If an adapter cannot be combined (more than A and B, trained tokens, an
            initialization that changed the base), or sites do not fit together. The model is unchanged then.
    """
    how = Combination(
        combination_type,
        svd_rank,
        svd_clamp,
        svd_full_matrices,
        svd_driver,
        density,
        majority_sign_method,
    )
    sources = _sources_of(model, adapters, weights)
    check_adapter_name(adapter_name)
    if adapter_name in adapter_names(model):
        raise ConfigError(f"adapter_name: there is an adapter {adapter_name!r} already")
    how = how.among(len(sources))
    tied = _keeps_tied(sources)
    values = {
        name: _combined(model, name, rows, how, max(_ranks(sources)))
        for name, rows in _parts_of(sources, tied).items()
    }
    new = put_adapter(model, _config(model, sources, values, tied), adapter_name)
    try:
        _fill(model, adapter_name, new, values, sources)
    except BaseException:
        delete_adapter(model, adapter_name)
        raise
    return model


def _ranks(sources: Sequence[Source]) -> list[int]:
    return [row.rank for source in sources for row in source.record.sites] or [1]


def _combined(
    model: nn.Module, name: str, parts: Sequence[Part], how: Combination, largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    site = parts[0][1].site
    terms = []
    for source, row in parts:
        a, b = (gathered(factor) for factor in factors_of(model, row, source.name).pair)
        if a.is_meta:
            raise ConfigError(
                f"{name}: {source.name!r} is on the meta device; load its values first"
            )
        if row.tied:
            a, b = a.T, b.T
        terms.append(Term(a, b, row.scale, source.weight))
    # As in PEFT, the default is the largest rank of the adapters, not of their factors at this site.
    if how.by_product and how.svd_rank is None and largest % site.groups == 0:
        how = dataclasses.replace(how, svd_rank=largest)
    combined = combine(
        terms,
        how,
        groups=site.groups,
        experts=site.experts is not None,
        layout=site.layout,
        where=name,
    )
    if "dare" not in how.kind:
        return combined
    weight = weight_at(model, site.weight)
    return agreed(combined[0], weight), agreed(combined[1], weight)


def _config(
    model: nn.Module,
    sources: Sequence[Source],
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    tied: bool,
) -> LoraConfig:
    """Return the first adapter's configuration with the sites, ranks and modules of the new adapter."""
    first = sources[0].record.config
    rows = {row.name: row for source in sources for row in source.record.sites}
    new = []
    for name, (a, _) in values.items():
        rank = a.shape[0 if rows[name].site.experts is None else 1]
        new.append(dataclasses.replace(rows[name], rank=rank, alpha=float(rank), scale=1.0))
    named = {entry for source in sources for entry in source.record.config.target_parameters or ()}
    saved = dict.fromkeys(name for source in sources for name in source.record.saved_modules)
    config = dataclasses.replace(
        first,
        use_rslora=False,
        ensure_weight_tying=tied,
        target_parameters=tuple(named) or None,
    )
    record = AdapterRecord(config, tuple(new), tuple(saved))
    return dataclasses.replace(
        written_config(model, record, by_site(new)), inference_mode=first.inference_mode
    )


def _fill(
    model: nn.Module,
    adapter: str,
    record: AdapterRecord,
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    sources: Sequence[Source],
) -> None:
    """Write the combined factors into the new adapter, and copy the modules that a source trains in full."""
    rows = {row.name: row for row in record.sites if not row.tied}
    if rows.keys() != values.keys():
        lost = min(rows.keys() ^ values.keys())
        raise ConfigError(
            f"{lost}: what the adapters have there cannot be added to the model again"
        )
    with torch.no_grad():
        for name, row in rows.items():
            for factor, value in zip(
                factors_of(model, row, adapter).pair, values[name], strict=True
            ):
                write(factor, value)
        for source in sources:
            for own in source.record.own:
                own_value(model, adapter, own).copy_(own_value(model, source.name, own))
