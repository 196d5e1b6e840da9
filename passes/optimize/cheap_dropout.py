"""Gives the branches that are not fused dropout that costs little: :func:`lora_fx.runtime.masks.dropped`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from lora_fx.ir import META_KEY, Capture, Pass, PassResult, Region, Role, Tag
from lora_fx.passes.graph import arguments, copy_graph, edit_graphs
from lora_fx.runtime import masks

__all__ = ["CheapDropout"]


@dataclasses.dataclass(frozen=True)
class CheapDropout(Pass):
    """The pass."""

    name: ClassVar[str] = "cheap-dropout"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph in which a branch drops something by itself."""
        return edit_graphs(capture, _edited)


def _edited(region: Region) -> fx.Graph | None:
    if not any(_drops(node) for node in region.graph.nodes):
        return None
    graph = copy_graph(region.graph)
    for node in graph.nodes:
        if _drops(node):
            given: dict[str, Any] = arguments(node, "input p=0.5 training=True")
            node.target, node.kwargs = masks.dropped, {}
            node.args = (given["input"], given["p"], given["training"])
    graph.lint()
    return graph


def _drops(node: fx.Node) -> bool:
    tag = node.meta.get(META_KEY)
    return node.target is F.dropout and isinstance(tag, Tag) and tag.role is Role.DROPOUT
