"""Makes one node of an operation and the branches of all adapters that rows of a batch have.

The adapter kind has named what computes several of its branches together, each over rows of its own
(:meth:`lora_fx.ir.OutputBuilder.fuse_by`). Branches of other kinds stay behind the node, and are cut down to
their rows by :class:`lora_fx.passes.insert.SelectRows`. Their order is free, since no row has two adapters.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from lora_fx.ir import META_KEY, Capture, FusedBranch, Pass, PassResult, Region, Role, Tag, join
from lora_fx.passes.graph import copy_graph, edit_graphs
from lora_fx.passes.insert import ROWS
from lora_fx.passes.optimize.fuse import Base, base_of, move, offered

__all__ = ["FuseRows"]


@dataclasses.dataclass(frozen=True)
class FuseRows(Pass):
    """The pass."""

    name: ClassVar[str] = "fuse-rows"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph that has such branches."""
        return edit_graphs(capture, _fused)


class _Joint(NamedTuple):
    """Branches of one operation that a function computes together.

    Attributes:
        node: The operation.
        base: What it computes.
        function: The function.
        sums: Where each branch is added.
    """

    node: fx.Node
    base: Base
    function: Any
    sums: Sequence[fx.Node]


def _fused(region: Region) -> fx.Graph | None:
    if not _joints(region):
        return None
    graph = copy_graph(region.graph)
    copied = dataclasses.replace(region, graph=graph)
    nodes = {node.name: node for node in graph.nodes}
    for joint in _joints(copied):
        _fuse(joint, copied, nodes)
    graph.lint()
    return graph


def _joints(region: Region) -> list[_Joint]:
    """What can be joined, in the order of the graph."""
    found = []
    for node in region.graph.nodes:
        tag = node.meta.get(META_KEY)
        if not isinstance(tag, Tag) or tag.role is not Role.BASE:
            continue
        base = base_of(node, region)
        if base is None or not _only_adapters(node):
            continue
        by_function = defaultdict(list)
        for total in _sums(node):
            branch = offered(total)
            if branch is not None and branch.rows is not None:
                by_function[branch.rows[base.kernel is not None]].append(total)
        if by_function:
            function, sums = max(by_function.items(), key=lambda item: len(item[1]))
            found.append(_Joint(node, base, function, sums))
    return found


def _sums(base: fx.Node) -> list[fx.Node]:
    """The nodes at which adapters are added to an operation, one after the other."""
    found: list[fx.Node] = []
    total: fx.Node | None = base
    while total is not None:
        following = None
        for user in total.users:
            tag = user.meta.get(META_KEY)
            added = isinstance(tag, Tag) and tag.role is Role.ADD
            if added and user.args[0] is total:
                following = user
        if following is not None:
            found.append(following)
        total = following
    return found


def _only_adapters(base: fx.Node) -> bool:
    """Whether nothing but adapters reads the output without them."""
    tags = [user.meta.get(META_KEY) for user in base.users]
    return all(isinstance(tag, Tag) and tag.adapter for tag in tags)


def _fuse(joint: _Joint, region: Region, nodes: Mapping[str, fx.Node]) -> None:
    graph, base, old = region.graph, joint.base, joint.node
    tags: list[Tag] = [one.meta[META_KEY] for one in joint.sums]
    branches = [branch for one in joint.sums if (branch := offered(one)) is not None]
    whole = Tag(old.meta[META_KEY].weight, Role.FUSED)
    for branch in branches:
        for name in (branch.a, branch.b, *(branch.dropout or ())):
            move(nodes[name], old)
    with graph.inserting_before(old):
        weight = base.weight
        if base.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = whole
        table = graph.get_attr(join(_holder(nodes[branches[0].a]), ROWS))
        table.meta[META_KEY] = whole
        given = (
            (base.x, weight, base.bias, table, tuple(tag.adapter for tag in tags)),
            (tuple(nodes[one.a] for one in branches), tuple(nodes[one.b] for one in branches)),
            (tuple(one.scale for one in branches), tuple(_dropout(one, nodes) for one in branches)),
            (tuple(_part(one, base) for one in branches), whole.weight),
        )
        arguments = tuple(one for several in given for one in several)
        fused = graph.call_function(joint.function, arguments, dict(base.kernel or {}))
    fused.meta[META_KEY] = whole
    for total in joint.sums:
        total.replace_all_uses_with(total.args[0])  # type: ignore[arg-type]
    old.replace_all_uses_with(fused)
    for total in joint.sums:
        graph.erase_node(total)
    _erase_unread(graph, {(tag.weight, tag.adapter) for tag in tags})
    graph.erase_node(old)


def _dropout(branch: FusedBranch, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...] | None:
    return None if branch.dropout is None else tuple(nodes[one] for one in branch.dropout)


def _part(branch: FusedBranch, base: Base) -> tuple[int, int] | None:
    """Which of the outputs a branch is added to."""
    if branch.padding is None:
        return None
    return branch.padding[0], base.outputs - branch.padding[1]


def _holder(factor: fx.Node) -> str:
    """Where the factors of a site are: the table of rows is next to them."""
    while factor.op != "get_attr":
        (factor,) = factor.all_input_nodes
    return str(factor.target).rpartition(".")[0].rpartition(".")[0]


def _erase_unread(graph: fx.Graph, branches: set[tuple[str, str]]) -> None:
    for node in reversed(graph.nodes):
        tag = node.meta.get(META_KEY)
        if isinstance(tag, Tag) and (tag.weight, tag.adapter) in branches and not node.users:
            graph.erase_node(node)
