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
from typing import Any

from torch import fx, nn

from lora_fx.passes._code import weights_read
from lora_fx.passes._fx import target_of
from lora_fx.passes._region import is_built_in
from lora_fx.passes._signature import WANTS_CACHE
from lora_fx.passes._weights import splits, weight_of
from lora_fx.passes.patterns import patterns
from lora_fx.passes.patterns.sites import itemised, site_name
from lora_fx.types import Capture, Match, Matches, Region, Rejection, Site, join

__all__ = ["match"]

_METADATA = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "layout"})
# What gives a weight another form, and says nothing about what is done with it.
_FORMS = frozenset(
    {"view", "reshape", "expand", "expand.default", "repeat", "unsqueeze", "squeeze", "clone", "to"}
)
# What is done with tables, tokens and biases of two dimensions: nothing that a low-rank factor stands for.
_NO_PRODUCTS = frozenset(
    {"add", "iadd", "add_", "add.Tensor", "cat", "concat", "cat.default", "stack", "attend"}
)
_METADATA_METHODS = frozenset(
    {"size", "dim", "numel", "element_size", "is_floating_point", "stride"}
)


def match(capture: Capture) -> Matches:
    """Matches the patterns of :func:`lora_fx.passes.patterns.patterns` against all regions.

    Returns:
        Sites in the order of the model's parameters, with ties marked.
    """
    found: dict[str, list[Site]] = defaultdict(list)
    rejections: dict[str, Rejection] = {}
    for region in capture.regions.values():
        for node in region.graph.nodes:
            seen = _ask(node, region)
            if isinstance(seen, Site):
                found[seen.weight].append(seen)
            elif isinstance(seen, Rejection):
                rejections.setdefault(seen.name, seen)
    readers = _readers(capture)
    nameless = _nameless(capture)
    sites: dict[str, list[Site]] = {}
    for weight, several in found.items():
        joined = nameless.get(weight) or _joined(several, readers.pop(weight, ()))
        if isinstance(joined, Rejection):
            rejections[joined.name] = joined
        else:
            sites[weight] = joined
    for weight, reads in readers.items():
        # A bias for each expert is a table, too.
        if all(read.what in _NO_PRODUCTS for read in reads) or weight.endswith("bias"):
            continue
        name = site_name(weight)
        rejections.setdefault(
            name, Rejection(name, f"its only use is by {reads[0].what}, not a linear operation")
        )
    whole = capture.frontend == "export"
    for weight in sites.keys() & (read := _read_by_code(capture)).keys():
        if whole and not _returns_cache(capture):
            # The graph of the whole model has it right, and nothing else: no call may go past it.
            sites[weight] = [_in_root(site) for site in sites[weight]]
            continue
        del sites[weight]
        rejections[read[weight].name] = read[weight]
    if not whole:
        rejections.update(_opaque(capture, rejections))
    return Matches(tuple(_ordered(capture.model, sites)), tuple(rejections.values()))


def _ask(node: fx.Node, region: Region) -> Match:
    for pattern in patterns():
        seen = pattern.match(node, region)
        if seen is not None:
            return seen
    return None


@dataclasses.dataclass(frozen=True)
class _Read:
    region: str
    node: str
    what: str


def _readers(capture: Capture) -> dict[str, list[_Read]]:
    """By FQN of each matrix: the nodes that read its values, transposes passed over."""
    result: dict[str, list[_Read]] = defaultdict(list)
    for region in capture.regions.values():
        for node in region.graph.nodes:
            parameter = region.parameter(node)
            if parameter is None or parameter.dim() < 2:
                continue
            name = join(region.fqn, str(node.target))
            for user in _consumers(node, region):
                result[name].append(
                    _Read(region.fqn, user.name, itemised(target_of(user) or user.target))
                )
    return result


def _nameless(capture: Capture) -> dict[str, Rejection]:
    """Tied weights that a graph reads without saying by which of their names.

    A trace calls every one of them by the first. Merging unties, so that it would matter.
    """
    result = {}
    everywhere = _places(capture.model)
    for region in capture.regions.values():
        read = [(n, p) for n in region.graph.nodes if (p := region.parameter(n)) is not None]
        if not any(
            "." in str(node.target) or len(region.module._parameters) > 1 for node, _ in read
        ):
            continue
        places = _places(region.module)
        for node, parameter in read:
            names = {join(region.fqn, name) for name in places[id(parameter)].values()}
            # A module under two names: its own graph has the first, one that reads it, the other.
            names.update(everywhere[id(parameter)][place] for place in places[id(parameter)])
            if len(names) == 1 or parameter.dim() < 2:
                continue
            reason = (
                f"its weight is one parameter under several names ({', '.join(sorted(names))}), "
                "and a forward reads it directly: call the module that holds it, or use one name"
            )
            for name in names:
                result[name] = Rejection(site_name(name), reason, region.fqn, node.name)
    return result


def _places(module: nn.Module) -> dict[int, dict[tuple[int, str], str]]:
    """By parameter: where it is registered, with a name for each place."""
    places: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for fqn, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[id(parameter)][id(owner), key] = join(fqn, key)
    return places


def _consumers(node: fx.Node, region: Region) -> Iterator[fx.Node]:
    for user in node.users:
        looks = weight_of(user, region) is not None or splits(user)
        if looks or itemised(target_of(user) or user.target) in _FORMS:
            yield from _consumers(user, region)
        elif not _asks_metadata(user):
            yield user


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.target is getattr and node.args[1] in _METADATA


def _joined(several: list[Site], reads: list[_Read] | tuple[_Read, ...]) -> list[Site] | Rejection:
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
        parts[site.rows] = dataclasses.replace(known, calls=known.calls + site.calls)
    ordered = sorted(parts.values(), key=lambda site: site.rows or (0, 0))
    for one, other in itertools.pairwise(ordered):
        if one.rows is None or other.rows is None or one.rows[1] > other.rows[0]:
            reason = "its weight is applied as a whole and in parts, or in parts that overlap"
            return Rejection(whole, reason, other.calls[0].region, other.calls[0].output)
    return ordered


def _way(site: Site) -> tuple[object, ...]:
    """What applications of one weight have to agree in to share their factors."""
    return (site.family, site.layout, site.view, site.experts)


def _read_by_code(capture: Capture) -> dict[str, Rejection]:
    """Matrices that a module without a graph does more with than call the layer that holds them."""
    result: dict[str, Rejection] = {}
    graphs = frozenset(region.module for region in capture.regions.values())
    first = {module: fqn for fqn, module in capture.model.named_modules()}
    for fqn in capture.opaque:
        module = capture.model.get_submodule(fqn)
        for name, reader in weights_read(module, graphs):
            owner, _, key = join(fqn, name).rpartition(".")
            weight = join(first[capture.model.get_submodule(owner)], key)
            reason = (
                f"its weight is also read by {reader}, which has no graph "
                f"({capture.opaque[fqn]}): an adapter would not be applied there"
            )
            result.setdefault(weight, Rejection(site_name(weight), reason, fqn))
    return result


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
        own = any(p is not None and p.dim() > 1 for p in module._parameters.values())
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
        tied[parameter.untyped_storage()._cdata].append(name)
    for name, parameter in named:
        sharing = tied[parameter.untyped_storage()._cdata]
        # A module under two names is one module.
        others = tuple(n for n in sharing if n != name and owner(n) is not owner(name))
        for site in sites.get(name, ()):
            yield dataclasses.replace(site, tied_to=others)
