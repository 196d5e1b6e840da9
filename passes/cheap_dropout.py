"""Gives the branches that are not fused dropout that costs little: :func:`lora_fx.masks.dropped`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from lora_fx.masks import dropped
from lora_fx.passes._fx import arguments
from lora_fx.passes._region import copy_graph
from lora_fx.types import META_KEY, Capture, PassResult, Role, Tag

__all__ = ["CheapDropout"]


@dataclasses.dataclass(frozen=True)
class CheapDropout:
    """The pass."""

    name: ClassVar[str] = "cheap_dropout"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph in which a branch drops something by itself."""
        known: dict[int, fx.Graph] = {}
        regions = dict(capture.regions)
        for fqn, region in regions.items():
            if not any(_drops(node) for node in region.graph.nodes):
                continue
            key = id(region.graph)
            if key not in known:
                known[key] = _edited(region.graph)
            regions[fqn] = dataclasses.replace(region, graph=known[key])
        if not known:
            return PassResult(capture, False)
        return PassResult(dataclasses.replace(capture, regions=regions), True)


def _edited(graph: fx.Graph) -> fx.Graph:
    graph = copy_graph(graph)
    for node in graph.nodes:
        if _drops(node):
            given: dict[str, Any] = arguments(node, "input p=0.5 training=True")
            node.target, node.kwargs = dropped, {}
            node.args = (given["input"], given["p"], given["training"])
    graph.lint()
    return graph


def _drops(node: fx.Node) -> bool:
    tag = node.meta.get(META_KEY)
    return node.target is F.dropout and isinstance(tag, Tag) and tag.role is Role.DROPOUT
