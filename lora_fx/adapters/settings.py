"""The configuration of given adapters: exact targets, ranks and alphas, as PEFT reads it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from lora_fx.adapters.checkpoint_layout import Layout
from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import alpha_for, rank_for
from lora_fx.ir.record import AdapterRecord
from lora_fx.ir.values import PlannedSite

__all__ = [
    "Target",
    "by_site",
    "origin_of",
    "targets_of",
    "with_patterns",
    "with_targets",
    "written_config",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One adapter, by the name that a configuration has for it.

    Attributes:
        name: FQN of a module, or of a parameter.
        rank, alpha: Its hyperparameters.
        parameter: Whether it is one of ``target_parameters``.
        within: Other names that look for a rank and an alpha of their own first.
    """

    name: str
    rank: int
    alpha: float
    parameter: bool = False
    within: tuple[str, ...] = ()


def with_targets(config: LoraConfig, targets: Iterable[Target], model: nn.Module) -> LoraConfig:
    """``config`` with these as its only targets, each with its own rank and alpha."""
    targets = tuple(targets)
    exact = dataclasses.replace(
        config,
        target_modules=_exactly(tuple(t.name for t in targets if not t.parameter), model),
        target_parameters=tuple(t.name for t in targets if t.parameter) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        loftq_config=None,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )
    return with_patterns(exact, targets) if targets else exact


def by_site(rows: Iterable[PlannedSite]) -> list[Target]:
    """Each site by its own name: what lora_fx adapts, whether or not PEFT has a name for it."""
    return [Target(row.name, row.rank, row.alpha) for row in rows]


def targets_of(record: AdapterRecord, layout: Layout) -> list[Target]:
    """What PEFT wraps for the sites that are not joined with others."""
    return [
        Target(row.site.weight, row.rank, row.alpha, parameter=True)
        if row.site.weight in layout.weights
        else Target(row.name, row.rank, row.alpha)
        for row in record.sites
        if row.tied or not layout.joins(row.site)
    ]


def written_config(
    model: nn.Module, record: AdapterRecord, targets: Iterable[Target]
) -> LoraConfig:
    """The configuration to save: targets, ranks and alphas are resolved, one by one."""
    targets = tuple(targets)
    parameters = any(target.parameter for target in targets)
    linear = [row.site.layout for row in record.sites if row.site.family == "linear"]
    config = dataclasses.replace(
        with_targets(record.config, targets, model),
        modules_to_save=record.saved_modules or None,
        inference_mode=True,
        # What PEFT otherwise corrects with a warning at every module. It allows neither of these two
        # where it wraps a parameter.
        fan_in_fan_out=bool(linear)
        and not parameters
        and all(layout == "in_out" for layout in linear),
        lora_dropout=0.0 if parameters else record.config.lora_dropout,
        base_model_name_or_path=record.config.base_model_name_or_path or origin_of(model),
    )
    if record.config.init_lora_weights == "loftq":
        config = dataclasses.replace(
            config, init_lora_weights="loftq", loftq_config=record.config.loftq_config
        )
    return config


def with_patterns(config: LoraConfig, targets: Sequence[Target]) -> LoraConfig:
    """The most frequent rank and alpha as defaults, patterns for the rest."""
    ranks = {target.name: target.rank for target in targets}
    alphas = {
        target.name: int(target.alpha) if float(target.alpha).is_integer() else target.alpha
        for target in targets
    }
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
    if all(_decided(target, plain, ranks, alphas) for target in targets):
        return plain
    # A key is a regular expression for the end of a name: "0" would decide for "block.0" as well.
    return resolved(lambda name: f"^{re.escape(name)}")


def _decided(
    target: Target,
    config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> bool:
    """Whether the patterns give a target its rank and alpha, by whichever name they are looked up."""
    return all(
        rank_for(names, config) == ranks[target.name]
        and alpha_for(names, config) == alphas[target.name]
        for names in ((target.name,), *((one, target.name) for one in target.within))
    )


def _exactly(names: tuple[str, ...], model: nn.Module) -> tuple[str, ...] | str:
    """``target_modules`` that mean these names and no others of the model.

    A name in a list also stands for every longer name that ends in it: then it takes an expression.
    """
    ends = tuple(f".{name}" for name in names)
    wanted = set(names)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(re.escape(name) for name in names)
    return names


def origin_of(model: nn.Module) -> str | None:
    origin = model.__dict__.get("name_or_path")
    return origin if isinstance(origin, str) and origin else None
