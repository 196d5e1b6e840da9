"""Every linear operation of a model in a row: what its adapter is, costs and does, or why it has none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import Originals
from lora_fx.config import LoraConfig, changes_base, judge
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir import Matches, Plan, PlannedSite, Record, Rejection, Site, join
from lora_fx.kinds import AdapterKind, chosen_kind
from lora_fx.passes.parameters import base_weight, factors_of, part_of, weight_at
from lora_fx.passes.patterns import pattern_of
from lora_fx.tools.adapter_folder import effective_rank, singular_values
from lora_fx.tools.draw.picture import SiteRow, State, Target

__all__ = [
    "rows_of_matches",
    "rows_of_model",
    "rows_of_plan",
    "targets_of",
    "why_not",
    "with_losses",
]

_MOST_ELEMENTS = 2**30
"""Up to this many elements of weights are read for ‖ΔW‖ / ‖W‖: about a second."""


def rows_of_plan(plan: Plan) -> tuple[SiteRow, ...]:
    """The sites of a plan, those that are not selected, and the refusals."""
    return (
        *(_planned(row) for row in plan.sites),
        *(_site(one.site, one.reason) for one in plan.skipped),
        *map(_refused, plan.rejections),
    )


def rows_of_matches(matches: Matches) -> tuple[SiteRow, ...]:
    """The linear operations of a model without adapters."""
    return (*map(_site, matches.sites), *map(_refused, matches.rejections))


def rows_of_model(model: nn.Module, record: Record) -> tuple[SiteRow, ...]:
    """The sites of a rewritten model, one row an adapter, and what else there is.

    Args:
        model: The model, from whose values the measures are taken if it has any.
        record: What it knows of itself.
    """
    rows: list[SiteRow] = []
    adapted: set[str] = set()
    left = _MOST_ELEMENTS
    for name, adapter in record.adapters.items():
        for row in adapter.sites:
            adapted |= {row.site.name, row.site.part_of}
            left -= math.prod(row.site.shape)
            effective, share = _measure(model, row, name) if left > 0 else (None, None)
            gradient = _gradient(model, row, name)
            made = dataclasses.replace(_planned(row), adapter=name, effective=effective)
            rows.append(dataclasses.replace(made, share=share, gradient=gradient))
    others = (site for site in record.base.matches.sites if site.name not in adapted)
    kept = (_site(site, why_not(site, record)) for site in others)
    return (*rows, *kept, *map(_refused, record.base.matches.rejections))


def with_losses(
    rows: Iterable[SiteRow], model: nn.Module, known: Record | Matches | None, original: Any
) -> tuple[SiteRow, ...]:
    """Adds to rows what quantizing has lost.

    Args:
        rows: Those of the model.
        model: The model.
        known: Its record, or its linear operations.
        original: What it was before it was quantized: a model, or its files. One weight is read at a time.

    Raises:
        ConfigError: The original has no such weight, or a start has changed the base since.
        CheckpointError: A file is missing or damaged.
    """
    matches = known.base.matches if isinstance(known, Record) else known
    adapters = known.adapters if isinstance(known, Record) else {}
    for name, adapter in adapters.items():
        if changes_base(start := adapter.config.init_lora_weights):
            raise ConfigError(
                f"the start {start!r} of adapter {name!r} has changed the base, so that its difference to "
                "the original is not what quantizing has lost: leave original out"
            )
    weights = Originals(original, getattr(model, "base_model_prefix", ""))
    sites = [row.site for adapter in adapters.values() for row in adapter.sites]
    lost: dict[str, float] = {}
    for site in (*sites, *(() if matches is None else matches.sites)):
        held = weight_at(model, site.weight)
        if site.quantized is None or site.name in lost or held.is_meta:
            continue
        exact = part_of(site, weights.of(site).to(held.device)).float()
        difference = exact - part_of(site, base_weight(model, site)).float()
        lost[site.name] = float(difference.norm() / exact.norm().clamp_min(1e-30))
    return tuple(dataclasses.replace(row, lost=lost.get(row.name)) for row in rows)


def why_not(site: Site, record: Record) -> str:
    """Why the configurations of the adapters do not select a site; empty where they say nothing."""
    several = len(record.adapters) > 1
    verdicts = {
        name: judge(site.name, adapter.config, in_default=_in_default(site))
        for name, adapter in record.adapters.items()
    }
    return "; ".join(
        f"{name}: {verdict.reason}" if several else verdict.reason
        for name, verdict in verdicts.items()
        if not verdict.selected
    )


def _in_default(site: Site) -> bool:
    return not (site.head or site.router or site.family == "embedding")


def _planned(row: PlannedSite) -> SiteRow:
    return dataclasses.replace(
        _site(row.site),
        state=State.ADAPTED,
        reason="",
        adapter="default",
        rank=row.rank,
        scale=row.scale,
        dropout=row.dropout,
        parameters=row.parameters,
        flops=row.flops,
        saved=row.saved,
    )


def _site(site: Site, reason: str = "") -> SiteRow:
    return SiteRow(
        name=site.name,
        state=State.BASE,
        pattern=site.pattern,
        shape=site.shape,
        quantized="" if site.quantized is None else str(site.quantized),
        reason=reason,
    )


def targets_of(
    sites: Iterable[Site], rejections: Iterable[Rejection], config: LoraConfig | None
) -> tuple[Target, ...]:
    """What a configuration could name.

    Args:
        sites: Linear operations, or parts of them, which stand for the whole.
        rejections: What cannot be adapted.
        config: The configuration that says which kind an adapter is; None is LoRA.
    """
    kind = chosen_kind(config or LoraConfig())
    wholes = dict.fromkeys(site.whole or site for site in sites)
    refused = (Target(one.name, reason=one.reason) for one in rejections)
    return (*(_target(site, kind) for site in wholes), *refused)


def _target(site: Site, kind: AdapterKind) -> Target:
    return Target(
        name=site.name,
        weight="" if site.weight == join(site.name, "weight") else site.weight,
        default=_in_default(site),
        linear=site.all_linear,
        each_rank=_each_rank(site) if kind.low_rank else 0.0,
        fixed=kind.costs(site).parameters,
        attention=site.attention,
        width=site.out_features if site.divisible else 0,
        parts=site.parts,
        reason=kind.objection(site) or "",
    )


def _refused(rejection: Rejection) -> SiteRow:
    return SiteRow(name=rejection.name, state=State.REFUSED, reason=rejection.reason)


def _each_rank(site: Site) -> float:
    """Trainable elements for each rank; a rank of a convolution has to be one that its groups divide."""
    try:
        return pattern_of(site).factors(site, site.groups).numel / site.groups
    except LoraFxError:
        return 0.0


def _measure(model: nn.Module, row: PlannedSite, adapter: str) -> tuple[float | None, float | None]:
    """Effective rank of BA and ‖ΔW‖ / ‖W‖; None where there are no values, or no such product."""
    site = row.site
    weight = weight_at(model, site.weight)
    if row.kind != "lora" or not row.rank or site.groups > 1:
        return None, None
    with torch.no_grad():
        a, b = (one.detach() for one in factors_of(model, row, adapter).pair)
        if any(type(one) not in (torch.Tensor, nn.Parameter) or one.is_meta for one in (a, b)):
            return None, None
        each = _singular_values(a, b, row)
        norm = float(torch.cat(each).norm())
        learned = math.isfinite(norm) and norm > 0
        effective = sum(map(effective_rank, each)) / len(each) if learned else None
        plain = type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta
        # What is sharded or offloaded has another shape here.
        if not plain or tuple(weight.shape) != site.weight_shape or site.quantized is not None:
            return effective, None
        if not math.isfinite(norm):
            return effective, None
        base = float(part_of(site, weight.detach()).float().norm())
    return effective, abs(row.scale) * norm / base if base else None


def _gradient(model: nn.Module, row: PlannedSite, adapter: str) -> float | None:
    """Norm of the gradient that the last backward pass has left."""
    found = [one.grad for one in factors_of(model, row, adapter).present if one.grad is not None]
    if not found or any(type(one) is not torch.Tensor or one.is_meta for one in found):
        return None
    return float(torch.stack([one.float().norm() for one in found]).norm())


def _singular_values(a: Tensor, b: Tensor, row: PlannedSite) -> list[Tensor]:
    """Those of BA, for each expert."""
    rank = row.rank
    pairs = zip(a.unbind(), b.unbind(), strict=True) if row.site.experts else [(a, b)]
    return [
        singular_values(
            one.reshape(rank, -1).float() if one.shape[0] == rank else one.float().T,
            other.float().reshape(-1, rank) if other.shape[1] == rank else other.float().T,
        )
        for one, other in pairs
    ]
