"""What a configuration chooses: by module, by parameter, by the attention layer that holds several weights.

PEFT adapts modules and parameters. Here the sites are operations, so that a name of either kind can mean
several: ``nn.MultiheadAttention`` is four, and a weight that is applied in parts is one for each part. The
rank and alpha of a site come from the pattern for its own name or, failing that, for the name that chose it.
The costs of an adapter at a site follow from its kind and its pattern.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from lora_fx.config import (
    LoraConfig,
    Verdict,
    alpha_for,
    excluded,
    judge,
    parameter_entry,
    rank_for,
    saved_by,
    scale_of,
    uses_default_targets,
)
from lora_fx.errors import ConfigError
from lora_fx.ir import Capture, Matches, PlannedSite, Site
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import base_dtype, base_modules
from lora_fx.passes.patterns import pattern_of

__all__ = ["Choice", "attention_of", "choices", "choose_parts", "priced"]


_ROWS = re.compile(r"(?P<name>.+)\.(?P<start>\d+)_(?P<stop>\d+)")


def choose_parts(site: Site, config: LoraConfig, whole: Verdict) -> list[tuple[Site, Verdict]]:
    """The parts of a site that are adapted in its place; empty if the site itself is meant.

    Args:
        site: Any site.
        config: What the user asks for.
        whole: What the configuration says of the site.

    Raises:
        ConfigError: If rows are named that the weight does not have, or that overlap.
    """
    if not site.divisible:
        return []
    parts = [site.part(name, rows) for name, rows in site.parts]
    if whole.selected:
        if not any(excluded(part.name, config) for part in parts):
            return []
        return [
            (part, judge(part.name, config) if excluded(part.name, config) else whole)
            for part in parts
        ]
    if uses_default_targets(config) or excluded(site.name, config):
        return []
    numbered = {part.rows: part for part in _by_number(site, config)}
    # Rows that have a name, too, are called what the configuration calls them.
    parts = [part for part in parts if part.rows not in numbered] + list(numbered.values())
    verdicts = [(part, judge(part.name, config)) for part in parts]
    selected = [part for part, verdict in verdicts if verdict.selected]
    _check(site, selected)
    return verdicts if selected else []


def _by_number(site: Site, config: LoraConfig) -> Iterator[Site]:
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ():
        found = _ROWS.fullmatch(target)
        if found is None or not f".{site.name}".endswith(f".{found['name']}"):
            continue
        rows = int(found["start"]), int(found["stop"])
        if not rows[0] < rows[1] <= site.out_features:
            raise ConfigError(
                f"target_modules {target!r}: {site.name} has the rows 0 to {site.out_features}, "
                "written start_stop as in a slice"
            )
        yield site.part(f"{found['start']}_{found['stop']}", rows)


def _check(site: Site, parts: list[Site]) -> None:
    ordered = sorted(part.rows or (0, 0) for part in parts)
    for one, other in itertools.pairwise(ordered):
        if one[1] > other[0]:
            raise ConfigError(
                f"target_modules names rows of {site.name} that overlap: {one[0]}_{one[1]} and "
                f"{other[0]}_{other[1]}; a row has one adapter"
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A site and what the configuration says of it.

    Attributes:
        site: The site.
        verdict: Whether it is selected, and why or why not.
        names: By which ranks and alphas are looked up, the first that a pattern knows.
        parameter: Whether ``target_parameters`` chose it.
    """

    site: Site
    verdict: Verdict
    names: tuple[str, ...]
    parameter: bool = False

    def rank(self, config: LoraConfig) -> int:
        """The rank of the adapter."""
        return rank_for(self.names, config)

    def alpha(self, config: LoraConfig) -> float:
        """The alpha of the adapter."""
        return float(alpha_for(self.names, config))

    def scale(self, config: LoraConfig) -> float:
        """The factor of the branch."""
        return scale_of(self.rank(config), self.alpha(config), config)


def choices(capture: Capture, matches: Matches, config: LoraConfig) -> Iterator[Choice]:
    """All sites, in their order; in the place of a fused one its parts, if those are meant.

    ``target_parameters`` comes first: a weight that it names is adapted whole, whatever
    ``exclude_modules`` and the layer filters say of the module. With ``ensure_weight_tying`` a head means
    the embedding whose weight it has: factors are an embedding's, and the head gets them transposed.
    """
    every = list(_choices(capture, matches, config))
    heads = {
        weight: one.site.name
        for one in every
        if config.ensure_weight_tying and one.verdict.selected and one.site.family == "linear"
        for weight in one.site.tied_to
    }
    for one in every:
        head, site = heads.get(one.site.weight), one.site
        if head is None or site.family != "embedding" or excluded(site.name, config):
            yield one
        else:
            verdict = Verdict(True, f"{head} is tied to it, which is selected")
            yield one if one.verdict.selected else dataclasses.replace(one, verdict=verdict)


def _choices(capture: Capture, matches: Matches, config: LoraConfig) -> Iterator[Choice]:
    attention = attention_of(capture.model, matches)
    for site in matches.sites:
        entry = parameter_entry(site.weight, config)
        if entry is not None:
            yield _as_parameter(site, entry, config)
            continue
        whole = judge(site.name, config, in_default=_in_default(site, config))
        parts = choose_parts(site, config, whole)
        if parts:
            yield from (Choice(part, verdict, (part.name,)) for part, verdict in parts)
            continue
        layer = attention.get(site.name)
        if layer is not None and not whole.selected and not excluded(site.name, config):
            yield _in_attention(site, whole, layer, config)
            continue
        yield Choice(site, whole, (site.name,))


def attention_of(model: nn.Module, matches: Matches) -> Mapping[str, str]:
    """The ``nn.MultiheadAttention`` of each site that is one of its projections, by the site's name.

    The rows of ``in_proj_weight`` or the three weights of unequal widths, and ``out_proj``.
    """
    layers = {
        name
        for name, module in base_modules(model, every_name=True)
        if isinstance(module, nn.MultiheadAttention)
    }
    found = {}
    for site in matches.sites if layers else ():
        for name in (site.owner, site.owner.rpartition(".")[0]):
            if name in layers:
                found[site.name] = name
                break
    return found


def _as_parameter(site: Site, entry: str, config: LoraConfig) -> Choice:
    saved = saved_by(site.name, config)
    if saved is not None:
        verdict = Verdict(False, f"trained in full: modules_to_save {saved!r}")
    else:
        verdict = Verdict(True, f"matches {entry!r} in target_parameters")
    return Choice(site, verdict, (site.weight,), parameter=True)


def _in_attention(site: Site, alone: Verdict, layer: str, config: LoraConfig) -> Choice:
    """A projection that is not named itself: the layer's name may be."""
    named = not uses_default_targets(config) and judge(layer, config).selected
    if not named:
        return Choice(site, alone, (site.name,))
    verdict = Verdict(True, f"a projection of {layer}, which target_modules names")
    return Choice(site, verdict, (site.name, layer))


def _in_default(site: Site, config: LoraConfig) -> bool:
    if config.target_modules is None:
        return site.family != "embedding" and not site.head
    # "all-linear" is PEFT's: it knows no other head than the one that the model declares.
    return site.family == "linear" and site.head != "declared"


def priced(model: nn.Module, row: PlannedSite) -> PlannedSite:
    """A planned site with what it costs: trainable elements, FLOPs and bytes saved for backward.

    Args:
        model: The model, rewritten or not.
        row: The site, with its rank, dropout, kind and what it is tied to.
    """
    site, kind = row.site, kind_of(row)
    itemsize = base_dtype(model, site).itemsize
    extra = kind.costs(site)
    parameters, flops, saved = extra.parameters, extra.flops, extra.saved * itemsize
    if kind.low_rank:
        pattern = pattern_of(site)
        parameters += 0 if row.tied else pattern.factors(site, row.rank).numel
        flops += pattern.flops(site, row.rank)
        # An index is saved as it is; a vector a second time, masked, with its mask, for dropout.
        saved += 8 if site.family == "embedding" else site.in_features * itemsize
        saved += site.in_features * (itemsize + 1) if row.dropout else 0
        saved += row.rank * itemsize
    # A region of a whole model and the regions below it show the same application twice.
    applied = max(Counter(call.region for call in site.calls).values())
    return dataclasses.replace(
        row, parameters=parameters, flops=flops * applied, saved=saved * applied
    )
