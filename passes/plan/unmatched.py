"""Entries of a configuration that select nothing: each in words, with what may have been meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lora_fx.config import (
    LoraConfig,
    judge,
    nearest_names,
    parameter_entry,
    unmatched,
    unmatched_saved,
)
from lora_fx.errors import some
from lora_fx.ir import Capture, Matches, PlannedSite, Rejection, Site
from lora_fx.passes.parameters import base_parameters
from lora_fx.passes.plan.choice import Choice, attention_of

__all__ = ["idle_entries", "idle_parameters", "refusals", "target_names"]


def _named_by(target: str, rejections: Iterable[Rejection], config: LoraConfig) -> list[Rejection]:
    """The refusals that an entry of ``target_modules`` runs into; those left out otherwise do not count.

    Args:
        target: The entry: a full name, or the end of one, of a module or of its weight.
        rejections: All of them.
        config: What excludes, saves in full, or is for some layers only.
    """
    return [
        one
        for one in rejections
        if any(_named(target, name) and judge(name, config).selected for name in one.names)
    ]


def refusals(
    targets: Iterable[str], rejections: tuple[Rejection, ...], config: LoraConfig
) -> Iterator[str]:
    """A line for each entry that selects refused weights and nothing else.

    Args:
        targets: Entries of ``target_modules``, a list, that selected no site.
        rejections: All that was refused.
        config: The configuration.
    """
    for target in targets:
        found = _named_by(target, rejections, config)
        reasons: dict[str, list[str]] = {}
        for rejection in found:
            reasons.setdefault(rejection.reason, []).append(rejection.name)
        for reason, names in reasons.items():
            yield f"{target!r}: {some(names, 3)} cannot be adapted: {reason}"


def target_names(model: nn.Module, matches: Matches, chosen: Iterable[Choice]) -> list[str]:
    """All that an entry of ``target_modules`` can mean: sites, parts of them, attention layers."""
    names = [site.name for site in matches.sites]
    names += [f"{site.name}.{part}" for site in matches.sites for part, _ in site.parts]
    names += [choice.site.name for choice in chosen if choice.site.part_of]
    return names + list(dict.fromkeys(attention_of(model, matches).values()))


def idle_entries(
    capture: Capture,
    config: LoraConfig,
    matches: Matches,
    chosen: Sequence[Choice],
    *,
    tied: bool,
) -> Iterator[str]:
    """A line for each entry that selects nothing.

    Args:
        capture: The model.
        config: What the user asks for.
        matches: All that can be adapted, and what cannot.
        chosen: What is adapted.
        tied: Whether ``ensure_weight_tying`` found something to tie.
    """
    names = target_names(capture.model, matches, chosen)
    selected = [name for one in chosen for name in (one.site.name, *one.names)]
    idle = unmatched(names, config, selected=selected)
    as_expression = isinstance(config.target_modules, str)
    for target in idle.targets:
        why = (
            _why_not_whole(target, names)
            if as_expression
            else _why(target, capture, matches, names)
        )
        yield f"target_modules {target!r}: {why}"
    for target in idle.filtered:
        yield f"target_modules {target!r}: {_filtered(target, chosen)}"
    for target, _, why in idle_parameters(capture.model, config, matches, chosen):
        yield f"target_parameters {target!r}: {why}"
    if config.ensure_weight_tying and not tied:
        yield (
            "ensure_weight_tying: no embedding that is adapted shares its weight with a linear head, and "
            "no module that is saved with another"
        )
    modules = [name for name, _ in capture.model.named_modules() if name]
    for scope in idle.scopes:
        yield f"scope {scope!r}: matches nothing{_nearest(nearest_names(scope, modules))}"
    for title, entries in (
        ("exclude_modules", idle.excludes),
        ("rank_pattern", idle.rank_keys),
        ("alpha_pattern", idle.alpha_keys),
        ("layers_to_transform", idle.layers),
        ("layers_pattern", idle.layers_patterns),
        ("modules_to_save", unmatched_saved(modules, config)),
    ):
        for entry in entries:
            yield f"{title} {entry!r}: matches nothing"


def idle_parameters(
    model: nn.Module, config: LoraConfig, matches: Matches, chosen: Iterable[Choice]
) -> Iterator[tuple[str, bool, str]]:
    """Entries of ``target_parameters`` by which nothing is adapted: whether it cannot be, and why.

    Args:
        model: The model.
        config: What the user asks for.
        matches: All that can be adapted, and what cannot.
        chosen: What is adapted.
    """
    used = {parameter_entry(choice.site.weight, config) for choice in chosen}
    weights = [site.weight for site in matches.sites]
    for target in config.target_parameters or ():
        if target in used:
            continue
        alone = dataclasses.replace(config, target_parameters=(target,))
        if any(parameter_entry(weight, alone) for weight in weights):
            # Also under a longer entry, which then counts in its place.
            if not any(parameter_entry(choice.site.weight, alone) for choice in chosen):
                yield target, False, "all that it names is left out (see 'not selected')"
            continue
        refused = [one for one in matches.rejections if _names_weight(target, one)]
        if refused:
            one = refused[0]
            yield target, True, f"{one.name} cannot be adapted: {one.reason}"
            continue
        found = [(n, p) for n, p in base_parameters(model).items() if parameter_entry(n, alone)]
        if found:
            name, parameter = found[0]
            shape = list(parameter.shape)
            yield target, True, f"{name} {shape} is the weight of no linear operation that was seen"
            continue
        near = nearest_names(target, weights)
        yield target, False, "matches nothing" + _nearest(near)


def _names_weight(target: str, rejection: Rejection) -> bool:
    return any(_named(target, name) for name in rejection.names)


def _filtered(target: str, chosen: Iterable[Choice] | Iterable[PlannedSite]) -> str:
    whole = next((one.site.name for one in chosen if _part_of(target, one.site)), None)
    if whole:
        return f"part of {whole}, which is adapted as a whole"
    return "all that it names is left out (see 'not selected')"


def _part_of(target: str, site: Site) -> bool:
    return any(_named(target, f"{site.name}.{part}") for part, _ in site.parts)


def _why_not_whole(expression: str, names: Sequence[str]) -> str:
    why = "a string is a regular expression for whole names, and this one matches none"
    if any(_named(expression, name) for name in names):
        return f"{why}; give a list, [{expression!r}], to select by the ends of names"
    return why + _nearest(nearest_names(expression, names))


def _why(target: str, capture: Capture, matches: Matches, names: list[str]) -> str:
    for rejection in matches.rejections:
        if _named(target, rejection.name):
            return f"{rejection.name} cannot be adapted: {rejection.reason}"
    for name, module in capture.model.named_modules():
        if name and _named(target, name):
            inner = [n for n in names if n.startswith(f"{name}.")]
            holds = f"; name what it holds, e.g. {inner[0]!r}" if inner else ""
            return f"{name} is a {type(module).__name__}, not a linear operation{holds}"
    for name in base_parameters(capture.model):
        if _named(target, name):
            return f"{name} is a parameter, and no linear operation over it was seen"
    return "matches nothing" + _nearest(nearest_names(target, names))


def _nearest(near: Sequence[str]) -> str:
    return f"; nearest: {', '.join(map(repr, near))}" if near else ""


def _named(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
