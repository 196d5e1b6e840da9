"""Rows of a model's linear operations: settings, costs and effects of the adapter, or why there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters import Originals
from lora_fx.config import ALL_LINEAR, LoraConfig, rank_for
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir import Matches, Plan, PlannedSite, Record, Rejection, Site, Skipped, join
from lora_fx.kinds import AdapterKind, base_change, site_kind
from lora_fx.passes.parameters import base_weight, factors_of, part_of, weight_at
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.plan import base_flops, choose, with_experts
from lora_fx.tools.adapter_folder import effective_rank, singular_values
from lora_fx.tools.draw.picture import SiteRow, State, Target, added, human, human_bytes

__all__ = [
    "cost_facts",
    "costs_of",
    "flops_of",
    "rows_of_matches",
    "rows_of_model",
    "rows_of_plan",
    "skipped_in",
    "targets_of",
    "unit_of",
    "with_losses",
]

_MOST_ELEMENTS = 2**30
"""Most elements of weights that are read for ‖ΔW‖ / ‖W‖, which takes about a second."""


def unit_of(rows: Iterable[PlannedSite]) -> str:
    """Return the unit of the costs of a single site, as the table of a plan has it."""
    return "position" if any(row.site.family == "conv" for row in rows) else "token"


def costs_of(
    flops: int, saved: int, unit: str, share: float | None = None
) -> tuple[tuple[str, str], ...]:
    """Return the costs of all adapters for one token, sample or position, as facts.

    Args:
        flops: FLOPs of the adapters.
        saved: Bytes that they save for the backward pass.
        unit: Token, sample or position.
        share: FLOPs of the adapters relative to those of all linear operations; None if unknown.
    """
    if not flops and not saved:
        return ()
    words = "" if share is None else f" ({added(share)})"
    return (
        (f"extra FLOPs a {unit}", human(flops) + words),
        (f"saved for backward a {unit}", human_bytes(saved)),
    )


def cost_facts(row: PlannedSite) -> tuple[tuple[str, str], ...]:
    """Return the costs of one adapter, as facts."""
    unit, base = unit_of([row]), base_flops(row.site)
    share = f" ({added(row.flops / base)})" if base else ""
    return (
        ("trainable", f"{row.parameters:,}"),
        (f"extra FLOPs a {unit}", f"{row.flops:,}{share}"),
        ("saved for backward", f"{row.saved:,} bytes a {unit}"),
    )


def flops_of(sites: Iterable[Site]) -> int:
    """Return the FLOPs of operations without adapters, for a token. Parts count as their whole, once."""
    wholes = {(site.whole or site).name: site.whole or site for site in sites}
    return sum(map(base_flops, wholes.values()))


def rows_of_plan(plan: Plan) -> tuple[SiteRow, ...]:
    """Return the rows of a plan's sites, of operations that are not selected, and of refusals."""
    return (
        *(_planned(row) for row in plan.sites),
        *(_site(skipped.site, skipped.reason) for skipped in plan.skipped),
        *map(_refused, plan.rejections),
    )


def rows_of_matches(matches: Matches) -> tuple[SiteRow, ...]:
    """Return the rows of linear operations of a model without adapters."""
    return (*map(_site, matches.sites), *map(_refused, matches.rejections))


def rows_of_model(model: nn.Module, record: Record) -> tuple[SiteRow, ...]:
    """Return the rows of a rewritten model: one per site and adapter, then the other operations.

    Args:
        model: The model. Measures are taken from its values, if it has any.
        record: The model's record.
    """
    rows: list[SiteRow] = []
    left = _MOST_ELEMENTS
    for name, adapter in record.adapters.items():
        for row in adapter.sites:
            left -= math.prod(row.site.shape)
            effective, share = _measure(model, row, name) if left > 0 else (None, None)
            gradient = _gradient(model, row, name)
            site_row = dataclasses.replace(_planned(row), adapter=name, effective=effective)
            rows.append(dataclasses.replace(site_row, share=share, gradient=gradient))
    kept = (_site(skipped.site, skipped.reason) for skipped in skipped_in(record))
    return (*rows, *kept, *map(_refused, record.base.matches.rejections))


def with_losses(
    rows: Iterable[SiteRow], model: nn.Module, known: Record | Matches | None, original: Any
) -> tuple[SiteRow, ...]:
    """Add the quantization errors to rows.

    Args:
        rows: Rows of the model.
        model: The model.
        known: Its record, or its linear operations.
        original: The model before it was quantized, or its files. One weight is read at a time.

    Raises:
        ConfigError: If the original lacks a weight, or an adapter's initialization has changed the base.
        CheckpointError: If a file is missing or damaged.
    """
    matches = known.base.matches if isinstance(known, Record) else known
    adapters = known.adapters if isinstance(known, Record) else {}
    for name, adapter in adapters.items():
        if setting := base_change(adapter.config):
            raise ConfigError(
                f"the start of adapter {name!r} ({setting}) has changed the base, so that its difference to "
                "the original is not what quantizing has lost: leave original out"
            )
    weights = Originals(original, model)
    sites = [row.site for adapter in adapters.values() for row in adapter.sites]
    lost: dict[str, float] = {}
    for site in (*sites, *(() if matches is None else matches.sites)):
        stored = weight_at(model, site.weight)
        if site.quantized is None or site.name in lost or stored.is_meta:
            continue
        exact = part_of(site, weights.of(site).to(stored.device)).float()
        difference = exact - part_of(site, base_weight(model, site)).float()
        lost[site.name] = float(difference.norm() / exact.norm().clamp_min(1e-30))
    return tuple(dataclasses.replace(row, lost=lost.get(row.name)) for row in rows)


def skipped_in(record: Record) -> tuple[Skipped, ...]:
    """Return the operations and parts of fused operations that have no adapter, with the reasons."""
    several = len(record.adapters) > 1
    planned = [row.site for adapter in record.adapters.values() for row in adapter.sites]
    # A fused operation with an adapted part is adapted, and so are all parts of an adapted operation.
    adapted = {site.name for site in planned}
    known = adapted | {site.part_of for site in planned}
    sites: dict[str, Site] = {}
    reasons: dict[str, list[str]] = {}
    for name, adapter in record.adapters.items():
        _, skipped = choose(record.base.matches, adapter.config, adapter.saved_modules)
        for site, reason in ((item.site, item.reason) for item in skipped):
            if site.name not in known and site.part_of not in adapted:
                sites.setdefault(site.name, site)
                reasons.setdefault(site.name, []).append(f"{name}: {reason}" if several else reason)
    return tuple(Skipped(site, "; ".join(reasons[name])) for name, site in sites.items())


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
        base=base_flops(site),
    )


def targets_of(
    sites: Iterable[Site],
    rejections: Iterable[Rejection],
    config: LoraConfig | None,
    model: nn.Module | None = None,
) -> tuple[Target, ...]:
    """Return the targets that a configuration could name.

    Args:
        sites: Linear operations, or parts of them, which stand for the whole operation.
        rejections: Operations that cannot be adapted.
        config: The configuration that sets the adapter's kind; None is LoRA.
        model: The model, for the experts that ``"all-linear"`` selects; None if it is unknown.
    """
    config = config or LoraConfig()
    wholes = tuple(dict.fromkeys(site.whole or site for site in sites))
    every = LoraConfig(r=1, target_modules=ALL_LINEAR)
    if model is not None:
        every = with_experts(every, model, wholes)
    linear, _ = choose(Matches(wholes, ()), every, ())
    times = {choice.site.name: choice.rank(every) for choice in linear}
    refused = (Target(rejection.name, reason=rejection.reason) for rejection in rejections)
    return (
        *(
            _target(site, site_kind(site, config), config, times.get(site.name, 0))
            for site in wholes
        ),
        *refused,
    )


def _target(site: Site, kind: AdapterKind, config: LoraConfig, linear: int) -> Target:
    rank = rank_for(site.name, config) if kind.low_rank else 0
    fixed, each = (kind.costs(site, size).parameters for size in (0, 1))
    return Target(
        name=site.name,
        weight="" if site.weight == join(site.name, "weight") else site.weight,
        default=_in_default(site),
        linear=linear,
        each_rank=_each_rank(site, kind) + each - fixed if kind.low_rank else 0.0,
        fixed=fixed,
        attention=site.attention,
        width=site.out_features if site.divisible else 0,
        parts=site.parts,
        reason=kind.objection(site, rank) or "",
    )


def _refused(rejection: Rejection) -> SiteRow:
    return SiteRow(name=rejection.name, state=State.REFUSED, reason=rejection.reason)


def _each_rank(site: Site, kind: AdapterKind) -> float:
    """Return the trainable elements that one unit of rank costs, or 0 if the factors have no shapes.

    They are counted at the least rank of a grouped convolution, which is the number of its groups.
    """
    try:
        shapes = pattern_of(site).factors(site, site.groups)
        sizes = {"a": math.prod(shapes.a), "b": math.prod(shapes.b)}
        return sum(sizes[letter] for letter in sizes.keys() - set(kind.frozen)) / site.groups
    except LoraFxError:
        return 0.0


def _measure(model: nn.Module, row: PlannedSite, adapter: str) -> tuple[float | None, float | None]:
    """Return effective rank of BA and ‖ΔW‖ / ‖W‖, or None without values or without such a product."""
    site = row.site
    weight = weight_at(model, site.weight)
    if row.kind != "lora" or not row.rank or site.groups > 1:
        return None, None
    with torch.no_grad():
        a, b = (factor.detach() for factor in factors_of(model, row, adapter).pair)
        if any(type(x) not in (torch.Tensor, nn.Parameter) or x.is_meta for x in (a, b)):
            return None, None
        each = _singular_values(a, b, row)
        norm = float(torch.cat(each).norm())
        learned = math.isfinite(norm) and norm > 0
        effective = sum(map(effective_rank, each)) / len(each) if learned else None
        plain = type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta
        # Sharded or offloaded weights have another shape here.
        if not plain or tuple(weight.shape) != site.weight_shape or site.quantized is not None:
            return effective, None
        if not math.isfinite(norm):
            return effective, None
        base = float(part_of(site, weight.detach()).float().norm())
    return effective, abs(row.scale) * norm / base if base else None


def _gradient(model: nn.Module, row: PlannedSite, adapter: str) -> float | None:
    """Return the norm of the gradient that the last backward pass left."""
    grads = [p.grad for p in factors_of(model, row, adapter).present if p.grad is not None]
    if not grads or any(type(grad) is not torch.Tensor or grad.is_meta for grad in grads):
        return None
    return float(torch.stack([grad.float().norm() for grad in grads]).norm())


def _singular_values(a: Tensor, b: Tensor, row: PlannedSite) -> list[Tensor]:
    """Return the singular values of BA, for each expert."""
    rank = row.rank
    pairs = zip(a.unbind(), b.unbind(), strict=True) if row.site.experts else [(a, b)]
    return [
        singular_values(
            left.reshape(rank, -1).float() if left.shape[0] == rank else left.float().T,
            right.float().reshape(-1, rank) if right.shape[1] == rank else right.float().T,
        )
        for left, right in pairs
    ]
