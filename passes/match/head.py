"""Finds the output head: the linear operation that every path to the output goes through last.

In a graph that is the first linear operation on the chain of dominators that leads from an output
back to the input (`networkx.immediate_dominators`): a residual connection around an operation means
that it is not the head. A block that repeats is never searched: its last layer is a layer like the
others. Where a model names its head itself (``get_output_embeddings`` of transformers,
``get_classifier`` of timm), that is believed. A transformers model without a graph of its own has
its head next to its base model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import networkx as nx
from torch import fx, nn

from lora_fx.ir import Capture, Matches, Pass, PassResult, Region, Site, join

__all__ = ["MarkHead", "find_head"]

_SOURCE = "source"
_HEAD_NAMES = frozenset(
    {
        "head",
        "lm_head",
        "classifier",
        "score",
        "fc",
        "fc_out",
        "out",
        "output",
        "logits",
        "proj_out",
    }
)


@dataclasses.dataclass(frozen=True)
class MarkHead(Pass):
    """The pass: marks the output head among the operations."""

    name: ClassVar[str] = "mark-head"
    needs: ClassVar[str] = "matches"

    def __call__(self, capture: Capture) -> PassResult:
        """Mark them."""
        assert capture.matches is not None
        return PassResult.of(capture, matches=find_head(capture, capture.matches))


def find_head(capture: Capture, matches: Matches) -> Matches:
    """Marks the output head among the sites of a model.

    Args:
        capture: The model.
        matches: Its linear operations.

    Returns:
        The same with ``Site.head`` set.
    """
    declared = frozenset(_declared(capture.model))
    found: frozenset[str] = frozenset()
    if not declared:
        outputs = {
            (call.region, call.output): site.weight for site in matches.sites for call in site.calls
        }
        with_sites = {region for region, _ in outputs}
        found = frozenset(
            weight
            for region in _last_regions(capture)
            for weight in _descend(capture, region, outputs, with_sites)
        )

        if not found and ("" not in capture.regions or capture.frontend == "export"):
            # An exported graph ends in what the model does with the output of its head.
            found = frozenset(_named(capture.model, matches.sites))

    def marked(site: Site) -> Site:
        if site.weight in declared:
            return dataclasses.replace(site, head="declared")
        return dataclasses.replace(site, head="found") if site.weight in found else site

    return dataclasses.replace(matches, sites=tuple(marked(site) for site in matches.sites))


def _named(model: nn.Module, sites: tuple[Site, ...]) -> Iterator[str]:
    """The last layer of a root without a graph, if it is called what such a layer is called."""
    last = [name for name, _ in model.named_children()][-1:]
    for site in sites:
        if site.family == "linear" and [site.owner] == last and last[0] in _HEAD_NAMES:
            yield site.weight


def _declared(model: nn.Module) -> Iterator[str]:
    names = {id(module): name for name, module in model.named_modules()}
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, method, lambda: None)()
        except Exception:  # noqa: BLE001, S112  a model's own method may fail in any way
            continue
        for one in head if isinstance(head, tuple | list) else (head,):
            if isinstance(one, nn.Module) and id(one) in names:
                yield join(names[id(one)], "weight")


def _last_regions(capture: Capture) -> list[Region]:
    """The root, or where it has no graph, what a transformers model has beside its base model."""
    if "" in capture.regions:
        return [capture.regions[""]]
    base = getattr(capture.model, "base_model_prefix", "")
    names = [name for name, _ in capture.model.named_children()]
    if base not in names:
        return []
    return [capture.regions[name] for name in names if name != base and name in capture.regions]


def _descend(
    capture: Capture, region: Region, outputs: dict[tuple[str, str], str], with_sites: set[str]
) -> Iterator[str]:
    above = _dominators(region.graph)
    for node in _leaves(region.graph):
        current: fx.Node | str | None = node
        while isinstance(current, fx.Node):
            weight = outputs.get((region.key, current.name))
            if weight is not None:
                yield weight
                break
            if current.op == "call_module":
                child = join(region.fqn, str(current.target))
                if any(name == child or name.startswith(f"{child}.") for name in with_sites):
                    if child in capture.regions and not _is_block(capture.model, child):
                        yield from _descend(capture, capture.regions[child], outputs, with_sites)
                    break
            current = above.get(current)


def _dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node | str]:
    flow = nx.DiGraph()
    flow.add_node(_SOURCE)
    for node in graph.nodes:
        if node.op == "placeholder":
            flow.add_edge(_SOURCE, node)
        for user in node.users:
            if node.op != "get_attr":
                flow.add_edge(node, user)
    found: dict[fx.Node, fx.Node | str] = nx.immediate_dominators(flow, _SOURCE)
    return found


def _leaves(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(output.all_input_nodes)


def _is_block(model: nn.Module, fqn: str) -> bool:
    module = model.get_submodule(fqn)
    parent, _, _ = fqn.rpartition(".")
    if isinstance(module, nn.Sequential) and fqn.rpartition(".")[2] in _HEAD_NAMES:
        # What it is made of says nothing, its name does.
        return False
    kinds = Counter(type(child) for child in model.get_submodule(parent).children())
    return kinds[type(module)] > 1 and any(True for _ in module.children())
