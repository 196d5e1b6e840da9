"""Lets each adapter's branch compute with the rows of its own samples, for batches of several adapters.

It comes after the branches: each activation that a branch reads is cut down to those rows, and its result is
added to them. What a branch computes, and how, stays as the pattern wrote it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import fx

from lora_fx.errors import ConfigError
from lora_fx.ir import META_KEY, Capture, Pass, PassResult, PlannedSite, Region, Role, Tag, join
from lora_fx.passes.graph import copy_graph, edit_graphs
from lora_fx.passes.patterns import constant_of
from lora_fx.runtime import add_rows, output_padding, put_rows, select_rows

__all__ = ["ROWS", "SelectRows", "check_rows"]

ROWS = "lora_rows"
"""Name of the :class:`lora_fx.runtime.samples.SampleRows` beside the factors of a site."""


def check_rows(rows: Iterable[PlannedSite]) -> None:
    """Refuses sites whose activations do not have the samples as their rows.

    Raises:
        ConfigError: For experts, whose rows are tokens sorted by expert, for products with the weight
            on the left, whose rows are features, and for einsums.
    """
    for row in rows:
        if row.site.experts:
            raise ConfigError(
                f"{row.name}: the rows of experts are tokens sorted by expert, not samples: choose one "
                "adapter for the whole batch"
            )
        if any(call.pattern == "einsum" for call in row.site.calls):
            raise ConfigError(
                f"{row.name}: it is written as an einsum, whose samples may be any of its letters: "
                "choose one adapter for the whole batch"
            )
        if any(call.left for call in row.site.calls):
            raise ConfigError(
                f"{row.name}: the weight is on the left of its product, so that the rows of the "
                "activation are features, not samples: choose one adapter for the whole batch"
            )


@dataclasses.dataclass(frozen=True)
class SelectRows(Pass):
    """The pass."""

    name: ClassVar[str] = "select-rows"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph that has branches."""
        return edit_graphs(capture, _edited)


def _adapter_of(node: fx.Node) -> str:
    tag = node.meta.get(META_KEY)
    return tag.adapter if isinstance(tag, Tag) else ""


def _edited(region: Region) -> fx.Graph | None:
    if not any(_adapter_of(node) for node in region.graph.nodes):
        return None
    graph = copy_graph(region.graph)
    work = _Work(dataclasses.replace(region, graph=graph))
    tagged = [(node, node.meta[META_KEY]) for node in graph.nodes if _adapter_of(node)]
    # First, since dropout comes before the factors are read.
    for node, tag in tagged:
        work.note(node, tag)
    for node, tag in tagged:
        if tag.role is Role.ADD:
            work.add(node, tag)
        else:
            work.select(node, tag)
    graph.lint()
    return graph


class _Work:
    """One graph that is being edited."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._holders: dict[tuple[str, str], str] = {}
        self._made: dict[Any, fx.Node] = {}

    def note(self, node: fx.Node, tag: Tag) -> None:
        """Remembers where the factors of a branch are: the rows lie beside them."""
        if tag.role is Role.FACTOR and node.op == "get_attr":
            holder = str(node.target).rpartition(".")[0].rpartition(".")[0]
            self._holders.setdefault((tag.weight, tag.adapter), holder)

    def select(self, node: fx.Node, tag: Tag) -> None:
        """Lets a node of a branch read the adapter's rows of whatever activation comes from outside."""

        def cut(read: fx.Node) -> fx.Node:
            inside = read.meta.get(META_KEY)
            if isinstance(inside, Tag) and inside.adapter and inside.role is not Role.ADD:
                return read
            if read.op == "get_attr" or constant_of(read, self._region) is not None:
                return read
            if read.target is output_padding:
                return read  # numbers that all samples share
            return self._call(("select", read, tag), node, tag, select_rows, read)

        node.args = fx.map_arg(node.args, cut)
        node.kwargs = fx.map_arg(node.kwargs, cut)

    def add(self, node: fx.Node, tag: Tag) -> None:
        """Adds a branch to the adapter's rows of the sum, or puts there what a variant makes of them."""
        total = node.args[0]
        if node.target is operator.add:
            new = self._call(("add", node), node, tag, add_rows, total, node.args[1])
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)
            return
        self.select(node, tag)
        node.meta[META_KEY] = dataclasses.replace(tag, role=Role.SCALE)
        new = self._call(("put", node), node.next, tag, put_rows, total, node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _call(self, key: Any, before: fx.Node, tag: Tag, function: Any, *args: Any) -> fx.Node:
        if isinstance(key[-1], Tag):
            # One selection for all nodes of a branch.
            key = (*key[:-1], tag.weight, tag.adapter)
        if key not in self._made:
            graph = self._region.graph
            holder = join(self._holders[tag.weight, tag.adapter], ROWS)
            with graph.inserting_before(before):
                rows = graph.get_attr(join(holder, tag.adapter))
                samples = graph.get_attr(join(holder, "samples"))
                repeats = graph.get_attr(join(holder, "repeats"))
                state = graph.get_attr(join(holder, "state"))
                known = (samples, repeats, state, tag.weight)
                call = graph.call_function(function, (args[0], rows, *args[1:], *known))
            role = Role.ROWS if function is select_rows else Role.ADD
            for one in (rows, samples, repeats, state, call):
                one.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
            call.meta[META_KEY] = Tag(tag.weight, role, tag.adapter)
            self._made[key] = call
        return self._made[key]
