"""Advice on a plan: the FLOPs that its targets cover, forgotten modules, capacity and learning rate.

The source of the rules is "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025,
doi:10.64434/tml.20250929). LoRA learns like full fine-tuning if all layers have adapters, and if the adapters
have enough parameters to store the information of the data. :mod:`lora_fx.ir.advice` has the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.config import LoraConfig, judge, parameter_entry, uses_default_targets
from lora_fx.errors import some
from lora_fx.ir import (
    Advice,
    Capacity,
    Capture,
    Coverage,
    LearningRate,
    Plan,
    PlannedSite,
    Site,
    folded,
    grouped,
)
from lora_fx.passes.parameters import base_modules
from lora_fx.passes.plan.choice import base_flops, positions_of, positions_read

__all__ = ["with_advice"]

_CONVOLUTIONS = 0.1
"""Share of the FLOPs below which convolutions are counted as if they had one position."""


def with_advice(
    plan: Plan, capture: Capture, example_inputs: Any = None, *, tokens: int | None = None
) -> Plan:
    """Return a plan with advice: forgotten modules, the capacity of the adapter, and a learning rate.

    Args:
        plan: The plan.
        capture: The capture of the plan.
        example_inputs: As for :func:`lora_fx.plan`. They determine the number of positions of convolutions.
        tokens: Number of tokens in the data that the loss counts, if it is known.
    """
    advice = Advice(
        coverage=_coverage(plan, capture.model, example_inputs),
        forgotten=(*_experts_left(plan), *_added_rows(plan, capture.model)),
        capacity=None if tokens is None else _capacity(plan, tokens),
        learning_rate=_learning_rate(plan, always=tokens is not None),
    )
    return dataclasses.replace(plan, advice=advice)


# --- coverage -------------------------------------------------------------------------------------


def _coverage(plan: Plan, model: nn.Module, example_inputs: Any) -> Coverage | None:
    inside = tuple(f"{name}." for name in plan.saved_modules)
    skipped = [operation.site for operation in plan.skipped]
    adapted = [row.site for row in plan.sites]
    adapted += [site for site in skipped if site.weight.startswith(inside)]
    uncovered = [site for site in skipped if not site.weight.startswith(inside)]
    routers = [site for site in (*adapted, *skipped) if site.router]
    adapted, uncovered = (
        [site for site in sites if not (site.head or site.router or site.family == "embedding")]
        for sites in (adapted, uncovered)
    )
    if not plan.sites:
        return None
    if not uncovered:
        return Coverage(1.0, ())
    flops = _flops([*adapted, *uncovered], routers, model, example_inputs)
    total = sum(flops.values())
    if not total:
        return None
    shares: dict[str, float] = defaultdict(float)
    for row in folded((site.name, repr(flops[site.name])) for site in uncovered):
        shares[row.name] += row.count * float(row.cells[0]) / total
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return Coverage(sum(flops[site.name] for site in adapted) / total, tuple(ordered))


def _flops(
    sites: list[Site], routers: list[Site], model: nn.Module, example_inputs: Any
) -> Mapping[str, float]:
    """Return the FLOPs of each operation by name, as weights for the share that an adapter covers.

    Returns:
        FLOPs for one token. If convolutions have more than a small share, FLOPs for one sample, or an empty
        mapping if the numbers of their positions are unknown.
    """
    used = _times_used(sites, routers, model)
    flops = {site.name: used.get(site.name, 1.0) * base_flops(site) for site in sites}
    of_convolutions = sum(flops[site.name] for site in sites if site.family == "conv")
    if of_convolutions <= _CONVOLUTIONS * sum(flops.values()):
        return flops
    positions = positions_of(model, sites, example_inputs)
    if any(site.name not in positions for site in sites):
        return {}
    return {
        site.name: flops[site.name] * positions_read(site, positions[site.name]) for site in sites
    }


def _times_used(
    sites: Iterable[Site], routers: Iterable[Site], model: nn.Module
) -> dict[str, float]:
    """Return by name how often a token uses each expert's operation on average: chosen experts / all experts.

    For a stack of experts, return the number of experts that a token uses.

    If the graph has no router for some experts, every token counts as using all of them.
    """
    sites = list(sites)
    lists = {name: len(m) for name, m in base_modules(model) if isinstance(m, nn.ModuleList)}
    used = {site.name: float(site.experts) for site in sites if site.experts}
    for router in routers:
        count = router.out_features
        chosen = router.chosen or count
        for mixture in (*_outer(router.owner), ""):
            prefix = f"{mixture}." if mixture else ""
            inside = [site for site in sites if site.weight.startswith(prefix)]
            stacked = [site.name for site in inside if site.experts == count]
            single = [
                site.name
                for site in inside
                if any(lists.get(name) == count for name in _outer(site.owner, mixture))
            ]
            if stacked or single:
                used |= dict.fromkeys(stacked, float(chosen))
                used |= dict.fromkeys(single, chosen / count)
                break
    return used


def _outer(name: str, outermost: str = "") -> Iterator[str]:
    """Yield a module's FQN and those of the modules around it, from the inside out, without the outermost."""
    while name and name != outermost:
        yield name
        name = name.rpartition(".")[0]


# --- forgotten modules ----------------------------------------------------------------------------


def _experts_left(plan: Plan) -> Iterator[str]:
    """Yield a line of advice if the configuration neither selects nor excludes a model's stacked experts.

    PEFT does not reach such parameters with the names of layers, only with ``target_parameters``.
    """
    config = plan.config
    anything = dataclasses.replace(config, target_modules=None, target_parameters=None)
    names = [
        skipped.site.name
        for skipped in plan.skipped
        if skipped.site.experts
        and judge(skipped.site.name, anything).selected
        and not _selects(config, skipped.site)
    ]
    if names:
        rows = grouped([(name, "") for name in names])
        yield (
            f"experts that no name of a layer selects, because they are parameters: {rows[0].name}; "
            "name them in target_modules, or in PEFT's target_parameters"
        )


def _selects(config: LoraConfig, site: Site) -> bool:
    if parameter_entry(site.weight, config) is not None:
        return True
    in_default = site.all_linear if config.target_modules is not None else True
    return uses_default_targets(config) and in_default


def _added_rows(plan: Plan, model: nn.Module) -> Iterator[str]:
    """Yield a line of advice for each range of new rows in an embedding or head that nothing trains.

    New rows belong to added tokens, and are not in the checkpoint.
    """
    grown = dict(_grown_vocabularies(model))
    trained = {row.name: set(row.indices) for row in plan.tokens}
    idle: dict[tuple[int, int], list[str]] = {}
    for skipped in plan.skipped:
        site = skipped.site
        is_lookup = site.family == "embedding"
        rows = site.in_features if is_lookup else site.out_features if site.head else 0
        if rows in grown and not f"{site.name}.".startswith(
            tuple(f"{name}." for name in plan.saved_modules)
        ):
            new = range(grown[rows], rows)
            if not trained.get(site.name, set()).issuperset(new):
                idle.setdefault((new.start, new.stop), []).append(site.name)
    for (start, stop), names in idle.items():
        yield (
            f"rows {start} to {stop - 1} of {some(names)} are not in the checkpoint, and nothing trains "
            "them: name them in trainable_token_indices, or the modules in modules_to_save"
        )


def _grown_vocabularies(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield (size now, size in the checkpoint) for each vocabulary that was enlarged after loading."""
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return
    stored = _stored_config(model.__dict__.get("name_or_path"))
    before, now = dict(_vocabularies(stored)), dict(_vocabularies(config.to_dict()))  # type: ignore[union-attr]
    for path, size in now.items():
        if 0 < before.get(path, 0) < size:
            yield size, before[path]


def _vocabularies(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each ``vocab_size`` in a nested configuration, with the keys that lead to it."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _vocabularies(value, (*path, key))
        elif key == "vocab_size" and isinstance(value, int):
            yield (*path, key), value


def _stored_config(origin: object) -> Mapping[str, Any]:
    """Return the ``config.json`` of the folder or the cached checkpoint that a model was loaded from.

    Return an empty dict if there is no such file. Nothing is downloaded.
    """
    if not isinstance(origin, str) or not origin:
        return {}
    path: Any = Path(origin) / "config.json"
    hub = sys.modules.get("huggingface_hub")
    try:
        if not path.is_file() and hub is not None:
            path = hub.try_to_load_from_cache(origin, "config.json")
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # not in the cache, or no valid name of a repository
        return {}
    return values if isinstance(values, dict) else {}


# --- capacity and learning rate -------------------------------------------------------------------


def _capacity(plan: Plan, tokens: int) -> Capacity:
    factors = sum(row.parameters for row in plan.sites if row.rank)
    return Capacity(tokens, plan.trainable_parameters, factors)


_RATE, _WIDTH = 5e-5 * 10, 2000
_POWERS = (0.0775, 0.781)
_MEASURED = range(2048, 8193)
"""Widths of the models for which the learning rate was fitted.

The rate is ``5e-5 · 10 · (2000 / width) ** power``, with the power 0.0775 for Qwen and 0.781 for Llama. Other
models get the range between the two. The numbers are from "Supervised Learning Hyperparameters" in the
documentation of Tinker (Thinking Machines Lab, 2025).
"""


def _learning_rate(plan: Plan, *, always: bool) -> LearningRate | None:
    rows = [row for row in plan.sites if row.rank]
    width = _width_of_language_model(plan)
    known = width is not None and width in _MEASURED
    if not rows or not (always or known):
        return None
    low = high = None
    if width is not None and known:
        low, high = sorted(_RATE * (_WIDTH / width) ** power for power in _POWERS)
    return LearningRate(low, high, width, _common_alpha(rows))


def _width_of_language_model(plan: Plan) -> int | None:
    """Return the width of a language model: the input features of its head, or None without such a head.

    A head of a language model has an output for each row of an embedding.
    """
    sites = [*(row.site for row in plan.sites), *(skipped.site for skipped in plan.skipped)]
    vocabularies = {site.in_features for site in sites if site.family == "embedding"}
    for site in sites:
        if site.head and site.family == "linear" and site.out_features in vocabularies:
            return site.in_features
    return None


def _common_alpha(rows: Iterable[PlannedSite]) -> float:
    """Return the alpha that most sites have. If a budget made the alphas differ, return their median."""
    alphas = [round(row.scale * row.rank, 6) for row in rows]
    alpha, count = Counter(alphas).most_common(1)[0]
    return alpha if 2 * count > len(alphas) else statistics.median(alphas)
