"""The configuration of given sites: exact targets, ranks and alphas, as PEFT reads it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from lora_fx.config import LoraConfig
from lora_fx.passes.selection import alpha_for, rank_for
from lora_fx.record import AdapterRecord

__all__ = ["with_patterns", "with_sites", "written_config"]


def with_sites(config: LoraConfig, names: Iterable[str], model: nn.Module) -> LoraConfig:
    """``config`` with these sites as its only targets."""
    return dataclasses.replace(
        config,
        target_modules=_exactly(tuple(names), model),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        loftq_config=None,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )


def written_config(model: nn.Module, record: AdapterRecord) -> LoraConfig:
    """The configuration to save: targets, ranks and alphas are resolved, site by site."""
    rows = record.sites
    linear = [row.site.layout for row in rows if row.site.family == "linear"]
    config = dataclasses.replace(
        with_sites(record.config, (row.name for row in rows), model),
        modules_to_save=record.saved_modules or None,
        inference_mode=True,
        # What PEFT otherwise corrects with a warning at every module.
        fan_in_fan_out=bool(linear) and all(layout == "in_out" for layout in linear),
        base_model_name_or_path=record.config.base_model_name_or_path or _origin(model),
    )
    if record.config.init_lora_weights == "loftq":
        config = dataclasses.replace(
            config, init_lora_weights="loftq", loftq_config=record.config.loftq_config
        )
    ranks = {row.name: row.rank for row in rows}
    alphas = {row.name: int(row.alpha) if row.alpha.is_integer() else row.alpha for row in rows}
    return with_patterns(config, ranks, alphas) if rows else config


def with_patterns(
    config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> LoraConfig:
    """The most frequent rank and alpha as defaults, patterns for the rest."""
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))

    def resolved(key: Callable[[str], str]) -> LoraConfig:
        return dataclasses.replace(
            config,
            r=int(r),
            rank_pattern={key(name): rank for name, rank in ranks.items() if rank != r},
            lora_alpha=alpha,
            alpha_pattern={key(name): one for name, one in alphas.items() if one != alpha},
        )

    plain = resolved(str)
    if all(rank_for(n, plain) == ranks[n] and alpha_for(n, plain) == alphas[n] for n in ranks):
        return plain
    # A key is a regular expression for the end of a name: "0" would decide for "block.0" as well.
    return resolved(lambda name: f"^{re.escape(name)}")


def _exactly(names: tuple[str, ...], model: nn.Module) -> tuple[str, ...] | str:
    """``target_modules`` that mean these names and no others of the model.

    A name in a list also stands for every longer name that ends in it: then it takes an expression.
    """
    ends = tuple(f".{name}" for name in names)
    wanted = set(names)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(re.escape(name) for name in names)
    return names


def _origin(model: nn.Module) -> str | None:
    origin = model.__dict__.get("name_or_path")
    return origin if isinstance(origin, str) and origin else None
