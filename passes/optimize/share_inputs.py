"""Makes one node of fused operations that read the same input: :func:`lora_fx.runtime.lora_linears`.

q, k and v of an attention layer then have one product with all their A's, and one gradient of what they
read. It comes after :mod:`lora_fx.passes.optimize.fuse`. Operations are in one graph where that was
captured whole, by ``export``, or where a module applies several weights itself; modules that are called
have graphs of their own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import fx

from lora_fx.ir import META_KEY, Capture, Pass, PassResult, Region, Tag
from lora_fx.passes.graph import copy_graph, edit_graphs, target_of
from lora_fx.runtime import fused_lora, in_place

__all__ = ["ShareInputs"]

_KNOWN = ("torch", "_operator", "math", "builtins", "lora_fx")
_WRITING = {
    "setitem",
    *(name for name in dir(operator) if name[0] == "i" and f"__{name}__" in dir(operator)),
}


@dataclasses.dataclass(frozen=True)
class ShareInputs(Pass):
    """The pass."""

    name: ClassVar[str] = "share-inputs"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph in which siblings read the same."""
        return edit_graphs(capture, _shared)


def _shared(region: Region) -> fx.Graph | None:
    """A copy of the graph with every group of siblings as one node; None if there is none."""
    if not _groups(region.graph):
        return None
    graph = copy_graph(region.graph)
    for group in _groups(graph):
        _join(graph, group)
    graph.lint()
    return graph


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Fused operations without dropout that read the same input, in the order of the graph."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    writes = 0
    for node in graph.nodes:
        writes += _may_write(node)
        if node.target is fused_lora.lora_linear and "dropout" not in node.kwargs:
            # What is written into between two operations is not the same for both.
            groups[node.args[0], _parent(node), writes].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _may_write(node: fx.Node) -> bool:
    """Whether a node may change one of its arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = target_of(node)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = getattr(target, "__name__", "")
    # torch says so by the name, or by a flag; of what else is called nobody knows.
    known = (getattr(target, "__module__", None) or "torch").split(".")[0] in _KNOWN
    flags = any(value is True for value in (*node.args, *node.kwargs.values()))
    writes = name.rstrip("_") != name or "out" in node.kwargs or target is in_place
    return not known or not name or flags or writes or name in _WRITING


def _parent(node: fx.Node) -> str:
    """The module that applies an operation.

    What reads the same elsewhere stays where it is: the keys of every layer of a decoder, for instance, which
    all read what the encoder gives.
    """
    tag: Tag = node.meta[META_KEY]
    path = tag.weight.split(".")
    # The weight of a layer, whose parent it is then, or a parameter of the module itself.
    return ".".join(path[: -2 if path[-1] == "weight" else -1])


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    for node in group[1:]:
        for argument in node.args[1:]:
            if isinstance(argument, fx.Node):
                _move(argument, first)
    columns = list(zip(*(node.args[1:] for node in group), strict=True))
    rows = tuple(node.kwargs.get("rows") for node in group)
    with graph.inserting_before(first):
        joint = graph.call_function(fused_lora.lora_linears, (first.args[0], *columns, rows))
        joint.meta[META_KEY] = first.meta[META_KEY]
        for place, node in enumerate(group):
            item = graph.call_function(operator.getitem, (joint, place))
            item.meta[META_KEY] = node.meta[META_KEY]
            node.replace_all_uses_with(item)
    for node in group:
        graph.erase_node(node)


def _move(node: fx.Node, before: fx.Node) -> None:
    """Reads a parameter, and what is made of it, earlier."""
    if node < before:
        return
    for source in node.all_input_nodes:
        _move(source, before)
    before.prepend(node)
