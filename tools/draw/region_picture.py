"""The inside of a region: the nodes of its graph as boxes, and the data flow between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import fx, nn

from lora_fx.ir.values import PlannedSite, Region, Role, join
from lora_fx.passes.graph.lazy import elements
from lora_fx.passes.graph.region import original_class
from lora_fx.tools.draw.node_picture import (
    adapters_of,
    measured,
    node_caption,
    node_facts,
    node_kind,
    node_name,
    tag_of,
)
from lora_fx.tools.draw.picture import Box
from lora_fx.tools.draw.structure import Digests, children_of, follows

__all__ = ["Painter", "RegionPainter", "parameter_counts"]


class Painter(Protocol):
    """What paints the modules that a region calls."""

    digest: Digests
    planned: dict[tuple[str, str], PlannedSite]

    def new_id(self) -> str:
        """The next free id."""

    def paint(self, modules: Sequence[nn.Module], fqns: Sequence[str]) -> Box:
        """The box of equal modules."""


def parameter_counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Trainable and frozen elements, those of a parameter that is met twice counted once."""
    unique = {id(p): p for p in parameters}.values()
    trainable = sum(elements(p) for p in unique if p.requires_grad)
    return trainable, sum(elements(p) for p in unique) - trainable


class RegionPainter:
    """Paints the graph of one module."""

    def __init__(self, painter: Painter, module: nn.Module, fqn: str, graph: fx.Graph) -> None:
        self._painter = painter
        self._fqn = fqn
        self._region = Region(fqn, module, graph)
        self._weights: dict[fx.Node, str] = {}
        for node in graph.nodes:
            self._absorb(node)
        self._inputs = {
            node: [n for n in node.all_input_nodes if n not in self._weights]
            for node in graph.nodes
            if node not in self._weights and not (node.op == "placeholder" and not node.users)
        }

    def children(self) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
        """The boxes inside the region and the edges between them."""
        runs = self._runs()
        first = {node: run[0] for run in runs for node in run}
        folded = {run[0]: run for run in runs}
        boxes: dict[fx.Node, Box] = {}
        for node in self._inputs:
            if first.get(node, node) is node:
                boxes[node] = self._box(node, folded.get(node, [node]))
        edges: dict[tuple[str, str], None] = {}
        for node, inputs in self._inputs.items():
            for source in inputs:
                a, b = (boxes[first.get(each, each)].id for each in (source, node))
                if a != b:
                    edges[a, b] = None
        return (*boxes.values(), *self._uncalled()), tuple(edges)

    def hyperparameters(self) -> tuple[tuple[str, str], ...]:
        """Rank and scale of each adapter in the region, as facts."""
        facts: list[tuple[str, str]] = []
        for weight, adapter in adapters_of(self._region.graph):
            values = self._hyper(weight, adapter)
            text = ", ".join(f"{label} {value}" for label, value in values)
            facts.append((f"adapter {adapter}", f"on {weight}" + (text and f": {text}")))
        return tuple(facts)

    def _absorb(self, node: fx.Node) -> None:
        """Makes a weight part of the operations that read it, and with it the cast of a factor."""
        tag = tag_of(node)
        readers = {user.op for user in node.users}
        if node.op == "get_attr":
            # Anything else that a tagged node reads is a switch, as self.training is of dropout.
            part = self._region.tensor(node) is not None or tag is not None
            if part and readers <= {"call_function", "call_method"}:
                self._weights[node] = str(node.target)
        elif tag is not None and tag.role is Role.CAST and "output" not in readers:
            # What else a cast reads, it reads for its dtype.
            source = next(iter(node.all_input_nodes), None)
            if source in self._weights:
                self._weights[node] = self._weights[source]

    def _runs(self) -> list[list[fx.Node]]:
        """Chains of calls of equal modules that are numbered in sequence."""
        chains: dict[fx.Node, list[fx.Node]] = {}
        for node in self._inputs:
            if node.op != "call_module" or node in chains:
                continue
            chain = chains[node] = [node]
            while (after := self._next(chain)) is not None:
                chain.append(after)
                chains[after] = chain
        return list({id(chain): chain for chain in chains.values() if len(chain) > 1}.values())

    def _next(self, chain: list[fx.Node]) -> fx.Node | None:
        last = chain[-1]
        after = next(iter(last.users)) if len(last.users) == 1 else None
        if after is None or after.op != "call_module":
            return None
        a, b = self._region.submodule(last), self._region.submodule(after)
        if a is None or b is None or a is b or not follows(str(last.target), str(after.target)):
            return None
        outside = set(self._inputs[after]) - {last}
        if not outside <= set(self._inputs[chain[0]]):
            return None
        return after if self._painter.digest(a) == self._painter.digest(b) else None

    def _box(self, node: fx.Node, run: list[fx.Node]) -> Box:
        module = self._region.submodule(node)
        if module is None or (not any(children_of(module)) and tag_of(node) is not None):
            return self._node(node)
        modules = [self._region.module.get_submodule(str(each.target)) for each in run]
        return self._painter.paint(modules, [join(self._fqn, str(each.target)) for each in run])

    def _uncalled(self) -> tuple[Box, ...]:
        """Child modules with parameters that the graph neither calls nor reads."""
        graph = self._region.graph
        called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        boxes: list[Box] = []
        for name, child in children_of(self._region.module):
            if any(target == name or target.startswith(f"{name}.") for target in called):
                continue
            own = {f"{name}.{parameter}" for parameter, _ in child.named_parameters()}
            if own - read:
                boxes.append(self._painter.paint([child], [join(self._fqn, name)]))
        return tuple(boxes)

    def _node(self, node: fx.Node) -> Box:
        weights = [self._weights[n] for n in node.all_input_nodes if n in self._weights]
        values = {name: self._value(name) for name in weights}
        tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
        tag = tag_of(node)
        facts = (
            ("node", node.name),
            ("module", self._fqn or "(root)"),
            ("class", original_class(self._region.module).__name__),
            *node_facts(node, tensors),
        )
        casts = [n for n in node.all_input_nodes if n in self._weights and n.op != "get_attr"]
        facts += tuple(("cast", f"{self._weights[n]} by {node_name(n)}") for n in casts)
        if tag is not None:
            facts += (("adapts", join(self._fqn, tag.weight)), ("role", str(tag.role)))
        if tag is not None and tag.adapter:
            facts += (("adapter", tag.adapter), *self._hyper(tag.weight, tag.adapter))
        trainable, frozen = parameter_counts(
            t for t in tensors.values() if isinstance(t, nn.Parameter)
        )
        return Box(
            id=self._painter.new_id(),
            kind=node_kind(node),
            name=node_name(node),
            caption=node_caption(node, tensors),
            fqn=self._fqn,
            facts=facts,
            trainable=trainable,
            frozen=frozen,
            adapter=tag.adapter if tag is not None else "",
        )

    def _value(self, name: str) -> object:
        value: object = self._region.module
        for atom in name.split("."):
            value = getattr(value, atom)
        return value

    def _hyper(self, weight: str, adapter: str) -> tuple[tuple[str, str], ...]:
        planned = self._painter.planned.get((join(self._fqn, weight), adapter))
        if planned is not None:
            facts = (("rank", str(planned.rank)), ("scale", f"{planned.scale:g}"))
            return (*facts, ("dropout", f"{planned.dropout:g}")) if planned.dropout else facts
        rank, scale = measured(self._region, weight, adapter)
        found = (("rank", rank), ("scale", scale))
        return tuple((label, f"{value:g}") for label, value in found if value is not None)
