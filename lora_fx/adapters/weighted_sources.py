"""The adapters that a weighted combination is made of: whether they go together, and who has what where."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

from torch import nn

from lora_fx.adapters.manage import adapter_record
from lora_fx.errors import ConfigError
from lora_fx.ir.record import AdapterRecord
from lora_fx.ir.values import PlannedSite

__all__ = ["Part", "Source", "keeps_tied", "parts_of", "sources_of"]


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the adapters that are combined."""

    name: str
    weight: float
    record: AdapterRecord


Part = tuple[Source, PlannedSite]
"""A source and what it has at a site."""


def sources_of(
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
        _check_source(source)
        for own in source.record.own:
            if owners.setdefault(own, source.name) != source.name:
                raise ConfigError(
                    f"{owners[own]!r} and {source.name!r} both train {own} in full (modules_to_save): "
                    "there is no sum of these; combine adapters of which one at most does"
                )
    return sources


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_source(source: Source) -> None:
    """Refuses what is more than ``s B A`` beside the base's own weights."""
    config = source.record.config
    for name in ("use_dora", "lora_bias", "trainable_token_indices"):
        if getattr(config, name):
            raise ConfigError(
                f"adapter {source.name!r} cannot be combined: of {name}={getattr(config, name)!r} "
                "there is no weighted sum"
            )
    if not source.record.initialized:
        raise ConfigError(
            f"adapter {source.name!r} cannot be combined: init_lora_weights={config.init_lora_weights!r} "
            "waits for data; give it its start with lora_fx.initialize"
        )
    if source.record.biases:
        raise ConfigError(
            f"adapter {source.name!r} cannot be combined: it trains biases of the base "
            f"(bias={config.bias!r}), and one adapter at most can"
        )
    if source.record.given:
        raise ConfigError(
            f"adapter {source.name!r} cannot be combined: its folder had other values of "
            f"{', '.join(source.record.given)} than the model: give the model those first"
        )
    changed = {row.site.weight for row in source.record.sites} & set(source.record.own)
    if changed:
        raise ConfigError(
            f"adapter {source.name!r} cannot be combined: its initialisation "
            f"({config.init_lora_weights!r}) changed {min(changed)}; save it and load it again, which "
            "makes it one of the base's own weights"
        )


def keeps_tied(sources: Sequence[Source]) -> bool:
    """Whether heads go on having the factors of their embedding: if it is so wherever one is adapted."""
    heads = {row.name for source in sources for row in source.record.sites if row.tied}
    flags = [source.record.config.ensure_weight_tying for source in sources]
    touches = [
        any(row.name in heads or row.site.family == "embedding" for row in source.record.sites)
        for source in sources
    ]
    return any(flags) and all(flag or not any_ for flag, any_ in zip(flags, touches, strict=True))


def parts_of(sources: Sequence[Source], tied: bool) -> dict[str, list[Part]]:
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
