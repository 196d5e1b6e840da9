"""A new adapter of a model from several that it has.

Each site is combined by itself (:mod:`lora_fx.passes.merge.combining`); the new adapter is then added as
one that is loaded would be, and given these values.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_names, adapter_record, delete_adapter, put_adapter
from lora_fx.adapters.settings import by_site, written_config
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import AdapterRecord, PlannedSite
from lora_fx.kinds import chosen_kind, is_plain
from lora_fx.passes.merge import (
    Combination,
    CombinationType,
    Election,
    SvdDriver,
    Term,
    combine,
)
from lora_fx.passes.parameters import (
    agreed,
    factors_of,
    gathered,
    inside,
    own_value,
    weight_at,
    write,
)
from lora_fx.runtime import check_adapter_name

__all__ = [
    "Part",
    "Source",
    "add_weighted_adapter",
]


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the adapters that are combined."""

    name: str
    weight: float
    record: AdapterRecord


Part = tuple[Source, PlannedSite]
"""A source and what it has at a site."""


def _sources_of(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float]
) -> tuple[Source, ...]:
    """The adapters by their names, if they can be combined.

    Raises:
        ConfigError: If the model has no such adapter, weights are none, or adapters have no sum.
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
    """What an adapter has more than ``s B A`` beside the base's own weights."""
    config, record = source.record.config, source.record
    if not is_plain(config) or config.trainable_token_indices:
        name = (
            "trainable_token_indices" if is_plain(config) else chosen_kind(config).field or "kind"
        )
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
    """Whether heads go on having the factors of their embedding: if it is so wherever one is adapted."""
    heads = {row.name for source in sources for row in source.record.sites if row.tied}
    flags = [source.record.config.ensure_weight_tying for source in sources]
    touches = [
        any(row.name in heads or row.site.family == "embedding" for row in source.record.sites)
        for source in sources
    ]
    return any(flags) and all(flag or not any_ for flag, any_ in zip(flags, touches, strict=True))


def _parts_of(sources: Sequence[Source], tied: bool) -> dict[str, list[Part]]:
    """Who has what at every site. Heads that stay tied are left out.

    Raises:
        ConfigError: If a site is part of another one.
    """
    found: dict[str, list[Part]] = {}
    for source in sources:
        for row in source.record.sites:
            if not (tied and row.tied):
                found.setdefault(row.name, []).append((source, row))
    for name, parts in found.items():
        source, row = parts[0]
        if row.site.part_of in found:
            other = found[row.site.part_of][0][0]
            raise ConfigError(
                f"{name} is adapted by {source.name!r}, and as part of {row.site.part_of} by "
                f"{other.name!r}: a part and its whole cannot be combined"
            )
    return found


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
    """Combines adapters into a new one, which is not active until :func:`lora_fx.set_adapter` makes it so.

    It covers every site that one of them has. A site that only some have is combined from those; a module
    that one of them trains in full (``modules_to_save``) is taken over as it is. One adapter alone is
    weighted, whatever the type. The new scale is 1, dropout and task type are those of the first adapter.

    Args:
        model: A rewritten model. It is changed.
        adapters: Names of its adapters.
        weights: One for each of them; negative ones take away.
        adapter_name: Name of the new one.
        combination_type: ``cat`` is exact, at the sum of the ranks, and ``svd`` the closest of a rank.
            ``linear`` adds the factors, which is quick and is not the sum. ``ties``, ``dare_linear``,
            ``dare_ties`` and ``magnitude_prune`` drop elements before; with ``_svd`` behind them they work
            on the change of the weight and not on the factors.
        svd_rank: For types with ``svd``: the rank, by default the largest of the adapters'.
        svd_clamp: For the same: the quantile at which elements of the new factors are clamped.
        svd_full_matrices: For the same: as ``torch.linalg.svd`` has it.
        svd_driver: For the same: as ``torch.linalg.svd`` has it; on CUDA only.
        density: For types that drop elements: which share is kept, in (0, 1].
        majority_sign_method: For types with ``ties``: ``total`` or ``frequency``.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a name is unknown or taken, an argument cannot mean anything, several of the adapters
            train the same module in full, one cannot be combined (more than A and B, trained tokens, an
            initialization that changed the base), or sites do not go together. The model is as it was then.
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
    # By default the rank is that of the adapter, and not of what it has here; as in PEFT.
    if how.by_product and how.svd_rank is None and largest % site.groups == 0:
        how = dataclasses.replace(how, svd_rank=largest)
    made = combine(
        terms,
        how,
        groups=site.groups,
        experts=site.experts is not None,
        layout=site.layout,
        where=name,
    )
    if "dare" not in how.kind:
        return made
    weight = weight_at(model, site.weight)
    return agreed(made[0], weight), agreed(made[1], weight)


def _config(
    model: nn.Module,
    sources: Sequence[Source],
    values: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    tied: bool,
) -> LoraConfig:
    """The first adapter's configuration with the sites, ranks and modules of the new one."""
    first = sources[0].record.config
    rows = {row.name: row for source in sources for row in source.record.sites}
    new = []
    for name, (a, _) in values.items():
        rank = a.shape[0 if rows[name].site.experts is None else 1]
        new.append(dataclasses.replace(rows[name], rank=rank, alpha=float(rank), scale=1.0))
    named = {entry for one in sources for entry in one.record.config.target_parameters or ()}
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
    """Gives the new adapter its values."""
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
