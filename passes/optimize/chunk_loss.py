"""Pass that turns a model's head into one call, so that the loss can run on a few rows at a time.

The operation of the head moves into a separate graph (:class:`lora_fx.runtime.loss.logits.Head`), together
with its branches of every adapter and kind. In this graph each row of the result depends only on the same row
of the head's input. Everything else that the graph reads (weights, factors, settings) is passed as arguments.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import ClassVar, NamedTuple

from torch import fx

from lora_fx.errors import CaptureError
from lora_fx.ir import (
    META_KEY,
    Call,
    Capture,
    Pass,
    PassResult,
    Region,
    Role,
    Site,
    relative,
    tag_of,
)
from lora_fx.passes.graph import copy_graph, may_write
from lora_fx.runtime.loss import logits

__all__ = ["ChunkLoss"]


@dataclasses.dataclass(frozen=True)
class ChunkLoss(Pass):
    """Pass that replaces the operation of each head by one call, if the head's loss may run in chunks."""

    name: ClassVar[str] = "chunk-loss"
    needs: ClassVar[str] = "matches"

    def __call__(self, capture: Capture) -> PassResult:
        """Edit the graph of each head whose loss may be computed in chunks.

        Raises:
            CaptureError: If a branch of a head reads more than the head does.
        """
        assert capture.matches is not None
        heads_by_region: dict[str, list[tuple[Site, Call]]] = defaultdict(list)
        for site in capture.matches.sites:
            for call in site.calls if site.loss == "chunked" else ():
                if call.region in capture.regions:
                    heads_by_region[call.region].append((site, call))
        regions = dict(capture.regions)
        for key, heads in heads_by_region.items():
            region = regions[key]
            graph = copy_graph(region.graph)
            edited = [_edit(region.with_graph(graph), *head) for head in heads]
            if any(edited):
                graph.lint()
                regions[key] = region.with_graph(graph)
        return PassResult.of(capture, regions=regions)


class _Body(NamedTuple):
    """Nodes that move into the separate graph of a head.

    Attributes:
        x: The input of the head.
        nodes: The operation and its branches, in the order of the graph.
        leaves: The other inputs of these nodes.
    """

    x: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


def _edit(region: Region, site: Site, call: Call) -> bool:
    """Move a head and its branches into a separate graph, and call that graph instead.

    Return False if an earlier run of the pass has done this.
    """
    graph = region.graph
    name = relative(site.weight, region.fqn)
    body = _body_of(graph, site, call, name)
    if body is None:
        return False
    own = fx.Graph()
    copies = {leaf: own.placeholder(leaf.name) for leaf in (body.x, *body.leaves)}
    for node in body.nodes:
        copies[node] = own.node_copy(node, copies.__getitem__)
    result = body.nodes[-1]
    own.output(copies[result])
    tagged = [(node, tag) for node in body.nodes if (tag := tag_of(node)) is not None]
    draws = any(node.kwargs.get("dropout") or tag.role is Role.DROPOUT for node, tag in tagged)
    # The call is named after the layer, without whitespace.
    word = "_".join(site.name.rpartition(".")[2].split()) or "head"
    head = logits.head_of(word, own, site.out_features, draws)
    with graph.inserting_before(result):
        replacement = graph.call_function(head, (body.x, *body.leaves))
    if tagged:
        replacement.meta[META_KEY] = dataclasses.replace(tagged[-1][1], role=Role.FUSED, fused=None)
    result.replace_all_uses_with(replacement)
    for node in reversed(body.nodes):
        graph.erase_node(node)
    return True


def _body_of(graph: fx.Graph, site: Site, call: Call, name: str) -> _Body | None:
    nodes = {node.name: node for node in graph.nodes}
    x = nodes[call.input]
    of_rows = _after(x)
    inside = {
        node
        for node in graph.nodes
        if node in of_rows and (node.name == call.output or _is_of(node, name))
    }
    if not inside or any(isinstance(node.target, logits.Head) for node in inside):
        return None
    body = tuple(node for node in graph.nodes if node in inside)
    leaves = dict.fromkeys(
        value
        for node in body
        for value in node.all_input_nodes
        if value not in inside and value is not x
    )
    varying = {
        value for start in graph.nodes if start.op == "placeholder" for value in _after(start)
    }
    odd = [value for value in leaves if value in varying or value.op == "placeholder"]
    odd += [value for node in body[:-1] for value in node.users if value not in inside]
    odd += [value for value in body if value.op != "call_function" and value.op != "call_method"]
    odd += [value for value in _between(body) if value not in inside and may_write(value)]
    if odd:
        raise CaptureError(
            f"{site.name}: the loss cannot be computed in chunks, since {odd[0].name} stands between the "
            "head and its branches, or gives them more than the head reads: leave loss='chunked' out"
        )
    return _Body(x, body, tuple(leaves))


def _is_of(node: fx.Node, name: str) -> bool:
    tag = tag_of(node)
    return tag is not None and tag.weight.partition("[")[0] == name


def _after(start: fx.Node) -> set[fx.Node]:
    """Return all nodes whose value depends on the value of a node."""
    readers: set[fx.Node] = set()
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node not in readers:
            readers.add(node)
            waiting += node.users
    return readers


def _between(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Return all nodes of the graph from the first of ``nodes`` to the last, in order."""
    result = [nodes[0]]
    while result[-1] is not nodes[-1]:
        result.append(result[-1].next)
    return result
