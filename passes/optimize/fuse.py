"""Makes one node of a linear operation and its branch.

It is :func:`lora_fx.runtime.fused_lora.lora_linear`, or with DoRA :func:`lora_fx.runtime.fused_dora.dora_linear`, which reads the
node of the gain, or over a quantised weight :func:`lora_fx.runtime.fused_quantized.quantized_lora_linear`. It comes
after the branches; :mod:`lora_fx.passes.optimize.fusable` says which it takes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from lora_fx.ir.values import META_KEY, Capture, PassResult, Region, Role, Tag
from lora_fx.passes.graph.edit import edit_graphs
from lora_fx.passes.graph.region import copy_graph
from lora_fx.passes.optimize.fusable import Fusable, fusable
from lora_fx.runtime.fused_dora import dora_linear
from lora_fx.runtime.fused_lora import lora_linear
from lora_fx.runtime.fused_quantized import quantized_lora_linear

__all__ = ["Fuse"]


@dataclasses.dataclass(frozen=True)
class Fuse:
    """The pass."""

    name: ClassVar[str] = "fuse"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph that has branches."""
        return edit_graphs(capture, _fused)


def _fused(region: Region) -> fx.Graph | None:
    """The graph with every branch fused that can be; None if there is none."""
    if not any(_tag(node) for node in region.graph.nodes):
        return None
    graph = copy_graph(region.graph)
    copied = dataclasses.replace(region, graph=graph)
    fused = False
    # One after the other, as values flow: what one operation gives may be what the next one reads.
    for node in list(graph.nodes):
        found = fusable(node, copied)
        if found is not None:
            _replace(graph, found)
            fused = True
    graph.lint()
    return graph if fused else None


def _replace(graph: fx.Graph, branch: Fusable) -> None:
    tag = dataclasses.replace(branch.total.meta[META_KEY], role=Role.FUSED)
    base = branch.operation
    with graph.inserting_before(branch.total):
        weight = base.weight
        if base.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = tag
        given: tuple[Any, ...] = (
            base.x,
            weight,
            base.bias,
            branch.a,
            branch.b,
            branch.scale,
        )
        function: Any = lora_linear
        if branch.gain is not None:
            function, given = dora_linear, (*given, branch.gain, branch.again)
        options: dict[str, Any] = {}
        if branch.dropout[0]:
            options = {"dropout": branch.dropout[0], "training": branch.dropout[1]}
        if branch.rows is not None:
            options["rows"] = branch.rows
        if base.kernel is not None:
            function, options = quantized_lora_linear, {**options, **base.kernel}
        node = graph.call_function(function, given, options)
    node.meta[META_KEY] = tag
    branch.total.replace_all_uses_with(node)
    for old in (branch.total, *branch.inner):
        graph.erase_node(old)
    for user in tuple(branch.base.users):
        # A cast to the dtype of the output: of this branch's factors, or of another adapter's.
        if user.users:
            user.replace_input_with(branch.base, node)
        else:
            graph.erase_node(user)
    graph.erase_node(branch.base)


def _tag(node: fx.Node) -> Tag | None:
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) and tag.adapter else None
