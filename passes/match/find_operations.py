"""Finds every linear operation: asks the patterns about every node of every region.

Nothing is edited and nothing is chosen here. A weight that is applied in several places is one
site. A weight that something else reads as well is refused: folding an adapter into it would change
that, too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import fx, nn

from lora_fx.errors import CaptureError, LoraFxError
from lora_fx.ir import Capture, Match, Matches, Pass, PassResult, Region, Rejection, Site, join
from lora_fx.passes.graph import WANTS_CACHE, is_built_in, is_matrix, storage_of
from lora_fx.passes.match.readers import Read, nameless, no_product, read_by_code, readers
from lora_fx.passes.match.unadaptable import unfit
from lora_fx.passes.patterns import patterns, site_name

__all__ = ["FindOperations", "match"]


@dataclasses.dataclass(frozen=True)
class FindOperations(Pass):
    """The pass: asks every pattern about every node."""

    name: ClassVar[str] = "match"

    def __call__(self, capture: Capture) -> PassResult:
        """Set the matches of the capture."""
        found = match(capture)
        if found == capture.matches:
            return PassResult(capture, False)
        return PassResult(dataclasses.replace(capture, matches=found), True)


def match(capture: Capture) -> Matches:
    """Matches the patterns of :func:`lora_fx.passes.patterns.registry.patterns` against all regions.

    Returns:
        Sites in the order of the model's parameters, with ties marked.
    """
    found, rejections = _asked(capture)
    read, one_of_several = readers(capture), nameless(capture)
    sites: dict[str, list[Site]] = {}
    for weight, several in found.items():
        joined = one_of_several.get(weight) or _joined(several, read.pop(weight, ()))
        if isinstance(joined, Rejection):
            rejections[joined.name] = joined
        else:
            sites[weight] = joined
    for weight, reads in read.items():
        unused = no_product(weight, reads)
        if unused is not None:
            rejections.setdefault(unused.name, unused)
    _check_opaque(capture, sites, rejections)
    for weight, rejection in unfit(capture.model):
        sites.pop(weight, None)
        rejections.pop(join(rejection.region, "parametrizations", weight.rpartition(".")[2]), None)
        rejections[rejection.name] = rejection
    return Matches(tuple(_ordered(capture.model, sites)), tuple(rejections.values()))


def _asked(capture: Capture) -> tuple[dict[str, list[Site]], dict[str, Rejection]]:
    """What the patterns say of all nodes: sites by weight, refusals by name."""
    found: dict[str, list[Site]] = defaultdict(list)
    rejections: dict[str, Rejection] = {}
    for region in capture.regions.values():
        for node in region.graph.nodes:
            seen = _ask(node, region)
            if isinstance(seen, Site):
                found[seen.weight].append(seen)
            elif isinstance(seen, Rejection):
                rejections.setdefault(seen.name, seen)
    return found, rejections


def _check_opaque(
    capture: Capture, sites: dict[str, list[Site]], rejections: dict[str, Rejection]
) -> None:
    """Takes out what modules without a graph do something with that no adapter would reach."""
    whole = capture.frontend == "export"
    read = read_by_code(capture)
    for weight in sites.keys() & read.keys():
        # The graph of the whole model has it right, and nothing else: no call may go past it. Nothing has
        # right what that graph does not apply, because the example inputs did not come to it.
        in_root = [site for site in map(_in_root, sites[weight]) if site.calls]
        if whole and in_root and not _returns_cache(capture):
            sites[weight] = in_root
            continue
        del sites[weight]
        rejections[read[weight].name] = read[weight]
    if not whole:
        rejections.update(_opaque(capture, rejections))


def _ask(node: fx.Node, region: Region) -> Match:
    for pattern in patterns():
        try:
            seen = pattern.match(node, region)
        except LoraFxError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the pattern {pattern.name!r} failed on node {node.name!r} of {region.fqn or '(root)'}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if seen is not None:
            return seen
    return None


def _joined(several: list[Site], reads: list[Read] | tuple[Read, ...]) -> list[Site] | Rejection:
    """The sites of one weight: one for all of it, or one for each of its parts."""
    whole = site_name(several[0].weight)
    own = {(call.region, call.output) for site in several for call in site.calls}
    for read in reads:
        if (read.region, read.node) not in own:
            reason = (
                f"its weight is also read by {read.what}: an adapter would change one use, a merge "
                "both"
            )
            return Rejection(whole, reason, read.region, read.node)
    parts: dict[tuple[int, int] | None, Site] = {}
    for site in several:
        known = parts.get(site.rows)
        if known is None:
            parts[site.rows] = site
            continue
        if _way(site) != _way(known):
            return Rejection(
                whole,
                f"its weight is applied in two ways ({known.pattern} and {site.pattern}): one "
                "adapter cannot stand for both",
                site.calls[0].region,
                site.calls[0].output,
            )
        parts[site.rows] = dataclasses.replace(
            known, bias=known.bias or site.bias, calls=known.calls + site.calls
        )
    ordered = sorted(parts.values(), key=lambda site: site.rows or (0, 0))
    for one, other in itertools.pairwise(ordered):
        if one.rows is None or other.rows is None or one.rows[1] > other.rows[0]:
            reason = (
                "its weight is applied as a whole (by the layer that holds it, if by nobody else) and "
                "in parts, or in parts that overlap"
            )
            return Rejection(whole, reason, other.calls[0].region, other.calls[0].output)
    return ordered


def _way(site: Site) -> tuple[object, ...]:
    """What applications of one weight have to agree in to share their factors."""
    return (site.family, site.layout, site.view, site.order, site.experts, site.groups)


def _returns_cache(capture: Capture) -> bool:
    """Whether calls that want a cache, as in ``generate()``, go past the graph of the whole model."""
    codegen: Any = capture.regions[""].graph._codegen
    return any(WANTS_CACHE in condition for condition in codegen.conditions())


def _in_root(site: Site) -> Site:
    return dataclasses.replace(site, calls=tuple(c for c in site.calls if not c.region))


def _opaque(capture: Capture, known: dict[str, Rejection]) -> dict[str, Rejection]:
    """Modules without a graph that hold a matrix of their own."""
    result = {}
    for fqn, reason in capture.opaque.items():
        module = capture.model.get_submodule(fqn)
        built_in = is_built_in(module)
        own = any(is_matrix(p) for p in module._parameters.values())
        if (own or built_in) and fqn not in known:
            result[fqn] = Rejection(fqn, reason if built_in else f"no graph: {reason}", fqn)
    return result


def _ordered(model: nn.Module, sites: dict[str, list[Site]]) -> Iterator[Site]:
    """Sites in parameter order, each with the FQNs of the other parameters over its storage."""
    tied: dict[int, list[str]] = defaultdict(list)
    named = list(model.named_parameters(remove_duplicate=False))

    def owner(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    for name, parameter in named:
        tied[storage_of(parameter)].append(name)
    for name, parameter in named:
        sharing = tied[storage_of(parameter)]
        # A module under two names is one module.
        others = tuple(n for n in sharing if n != name and owner(n) is not owner(name))
        for site in sites.get(name, ()):
            yield dataclasses.replace(site, tied_to=others)
