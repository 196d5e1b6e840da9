"""Lets the loss of a model be computed in chunks: its head becomes one call, a function of rows.

The operation and its branches, of every adapter and kind, move into a graph of their own
(:class:`lora_fx.runtime.logits.Head`), in which nothing depends on a row but through what the head reads.
Everything else that they read (weights, factors, settings) is given to it.
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
from lora_fx.runtime import logits

__all__ = ["ChunkLoss"]


@dataclasses.dataclass(frozen=True)
class ChunkLoss(Pass):
    """Makes a call of each head whose loss may be computed in chunks."""

    name: ClassVar[str] = "chunk-loss"
    needs: ClassVar[str] = "matches"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits the graph of each head whose loss may be computed in chunks.

        Raises:
            CaptureError: If a branch of a head reads more than the head does.
        """
        assert capture.matches is not None
        found: dict[str, list[tuple[Site, Call]]] = defaultdict(list)
        for site in capture.matches.sites:
            for call in site.calls if site.loss == "chunked" else ():
                if call.region in capture.regions:
                    found[call.region].append((site, call))
        regions = dict(capture.regions)
        for key, heads in found.items():
            region = regions[key]
            graph = copy_graph(region.graph)
            edited = [_edit(region.with_graph(graph), *one) for one in heads]
            if any(edited):
                graph.lint()
                regions[key] = region.with_graph(graph)
        return PassResult.of(capture, regions=regions)


class _Body(NamedTuple):
    """What becomes a function of rows.

    Attributes:
        x: What the head reads.
        nodes: The operation and its branches, in the order of the graph.
        leaves: What they read besides.
    """

    x: fx.Node
    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


def _edit(region: Region, site: Site, call: Call) -> bool:
    """Puts a call in place of a head; False if there is one already."""
    graph = region.graph
    name = relative(site.weight, region.fqn)
    body = _body_of(graph, site, call, name)
    if body is None:
        return False
    own = fx.Graph()
    copies = {one: own.placeholder(one.name) for one in (body.x, *body.leaves)}
    for node in body.nodes:
        copies[node] = own.node_copy(node, copies.__getitem__)
    result = body.nodes[-1]
    own.output(copies[result])
    tagged = [(one, tag) for one in body.nodes if (tag := tag_of(one)) is not None]
    draws = any(one.kwargs.get("dropout") or tag.role is Role.DROPOUT for one, tag in tagged)
    # Its name is that of the layer, without what Python does not take.
    word = "_".join(site.name.rpartition(".")[2].split()) or "head"
    head = logits.head_of(word, own, site.out_features, draws)
    with graph.inserting_before(result):
        made = graph.call_function(head, (body.x, *body.leaves))
    if tagged:
        made.meta[META_KEY] = dataclasses.replace(tagged[-1][1], role=Role.FUSED, fused=None)
    result.replace_all_uses_with(made)
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
    found = tuple(node for node in graph.nodes if node in inside)
    leaves = dict.fromkeys(
        one for node in found for one in node.all_input_nodes if one not in inside and one is not x
    )
    varying = {one for start in graph.nodes if start.op == "placeholder" for one in _after(start)}
    odd = [one for one in leaves if one in varying or one.op == "placeholder"]
    odd += [one for node in found[:-1] for one in node.users if one not in inside]
    odd += [one for one in found if one.op != "call_function" and one.op != "call_method"]
    odd += [one for one in _between(found) if one not in inside and may_write(one)]
    if odd:
        raise CaptureError(
            f"{site.name}: the loss cannot be computed in chunks, since {odd[0].name} stands between the "
            "head and its branches, or gives them more than the head reads: leave loss='chunked' out"
        )
    return _Body(x, found, tuple(leaves))


def _is_of(node: fx.Node, name: str) -> bool:
    tag = tag_of(node)
    return tag is not None and tag.weight.partition("[")[0] == name


def _after(start: fx.Node) -> set[fx.Node]:
    """What is computed of a node."""
    found: set[fx.Node] = set()
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found


def _between(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Return the nodes from the first to the last."""
    found = [nodes[0]]
    while found[-1] is not nodes[-1]:
        found.append(found[-1].next)
    return found
