"""Models and plans as pictures: modules or names become nested boxes, equal neighbors become one."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import (
    META_KEY,
    Plan,
    PlannedSite,
    Record,
    Region,
    Rejection,
    Role,
    Skipped,
    Tag,
    join,
    module_of,
)
from lora_fx.passes.graph import elements, original_class
from lora_fx.tools.draw.picture import (
    Box,
    Kind,
    Picture,
    elide,
    follows,
    human,
    name_of,
    runs,
    times,
)

__all__ = ["picture_of_model", "picture_of_plan"]


_Legend = tuple[tuple[Kind, str], ...]
_LEGEND: _Legend = (
    (Kind.BASE, "base operation"),
    (Kind.DROPOUT, "dropout"),
    (Kind.DOWN, "A: down to the rank"),
    (Kind.UP, "B: up again"),
    (Kind.SCALE, "scale"),
    (Kind.ADD, "add"),
    (Kind.ADAPTER, "other adapter node"),
    (Kind.OPAQUE, "no graph: children in registration order"),
)


def picture_of_model(
    model: nn.Module, graphs: Mapping[str, fx.Graph], notes: Sequence[str] = ()
) -> Picture:
    """Draws a model.

    Args:
        model: Any module.
        graphs: The graphs of its regions by key; a module without one is a box of its children. Of a module
            with several forms the first is drawn, and the others are named.
        notes: Remarks for the reader.
    """
    by_module: dict[int, fx.Graph] = {}
    other_forms: dict[int, list[str]] = {}
    for key, graph in graphs.items():
        module = model.get_submodule(module_of(key))
        if by_module.setdefault(id(module), graph) is not graph:
            form = Region.at(key, module, graph).form
            other_forms.setdefault(id(module), []).append(form)
    root = _Painter(model, by_module, other_forms).paint([model], [""])
    total = root.trainable + root.frozen
    return Picture(
        title=original_class(model).__name__,
        facts=(
            ("parameters", human(total)),
            ("trainable", _of_all(root.trainable, total)),
            ("adapted sites", str(root.sites)),
        ),
        root=root,
        legend=_occurring(_LEGEND, root),
        notes=tuple(notes),
    )


def _of_all(trainable: int, total: int) -> str:
    """How many elements are trained, and what share that is."""
    return human(trainable) + (f" ({100 * trainable / total:.3g} %)" if total else "")


def _occurring(legend: _Legend, root: Box) -> _Legend:
    """The kinds that occur in a picture."""
    kinds = {box.kind for box in root.walk()}
    return tuple((kind, text) for kind, text in legend if kind in kinds)


class _Painter:
    """Paints modules; gives every box its id, in an order that depends on the model alone."""

    def __init__(
        self,
        model: nn.Module,
        graphs: Mapping[int, fx.Graph],
        other_forms: Mapping[int, Sequence[str]],
    ) -> None:
        self.graphs = graphs
        self.other_forms = other_forms
        self.digest = Digests(graphs)
        self._ids = itertools.count()
        self._drawn: dict[int, str] = {}
        record = model.__dict__.get("_lora_fx")
        self.planned = {
            (row.site.place, name): row
            for name, adapter in (record.adapters.items() if isinstance(record, Record) else ())
            for row in adapter.sites
        }

    def new_id(self) -> str:
        """The next free id."""
        return f"n{next(self._ids)}"

    def paint(self, modules: Sequence[nn.Module], fqns: Sequence[str]) -> Box:
        """The box of ``modules[0]``, which stands for all ``modules`` (they are equal).

        Args:
            modules: The modules.
            fqns: Their FQNs.
        """
        module, fqn = modules[0], fqns[0]
        cls = original_class(module).__name__
        graph = self._graph_to_draw(module)
        kids = list(children_of(module))
        trainable, frozen = parameter_counts(p for m in modules for p in m.parameters())
        total = trainable + frozen
        sites = sum(self._sites(child) for m in modules for child in m.modules())
        name = name_of(fqns)
        facts = _facts(module, fqns, trainable, frozen, sites)
        again = self._drawn.setdefault(id(module), fqn)
        if again != fqn and (graph is not None or kids or total):
            facts = (*facts, ("drawn at", again or "(root)"))
            return Box(self.new_id(), Kind.CALL, name, f"{cls}, shared", fqn, facts)
        box_id = self.new_id()
        kind = Kind.LEAF
        children: tuple[Box, ...] = ()
        edges: tuple[tuple[str, str], ...] = ()
        if graph is not None:
            kind = Kind.MODULE
            region = RegionPainter(self, module, fqn, graph)
            children, edges = region.children()
            facts += (("graph", f"{len(graph.nodes)} nodes"), *region.hyperparameters())
            if forms := self.other_forms.get(id(module)):
                facts += (("other graphs", "; ".join(f"for a call with {form}" for form in forms)),)
        elif kids:
            kind = Kind.OPAQUE
            children = self._siblings(fqn, kids)
            if isinstance(module, nn.ModuleList) and len(children) == 1 and children[0].repeats:
                return children[0]
            facts += (("graph", "none: children in registration order"),)
        return Box(
            id=box_id,
            kind=kind,
            name=name,
            caption=self._caption(module) + (f" · {human(total)}" if children and total else ""),
            fqn=fqn,
            facts=facts,
            children=children,
            edges=edges,
            flow=graph is not None,
            repeats=tuple(fqns) if len(fqns) > 1 else (),
            sites=sites,
            trainable=trainable,
            frozen=frozen,
        )

    def _siblings(self, fqn: str, kids: Iterable[tuple[str, nn.Module]]) -> tuple[Box, ...]:
        names, modules = zip(*kids, strict=True)
        digests = [self.digest(module) for module in modules]
        return tuple(
            self.paint([modules[i] for i in run], [join(fqn, names[i]) for i in run])
            for run in runs(names, digests)
        )

    def _sites(self, module: nn.Module) -> int:
        graph = self.graphs.get(id(module))
        return len({weight for weight, _ in adapters_of(graph)}) if graph is not None else 0

    def _caption(self, module: nn.Module) -> str:
        caption = original_class(module).__name__
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1:
            stored = "" if quantization_of(weight) is None else f" {dtype_name(weight)}"
            caption = f"{caption} {size_name(weight)}{stored}"
        graph = self.graphs.get(id(module))
        if graph is None:
            return caption
        region = Region("", module, graph)
        found = (measured(region, *adapter)[0] for adapter in adapters_of(graph))
        ranks = sorted({rank for rank in found if rank is not None})
        return f"{caption} · r {', '.join(map(str, ranks))}" if ranks else caption

    def _graph_to_draw(self, module: nn.Module) -> fx.Graph | None:
        # What nn.ReLU or nn.LayerNorm does inside is no news, unless there is an adapter in it; and
        # a module that does one thing is that thing.
        graph = self.graphs.get(id(module))
        if graph is None or any(META_KEY in node.meta for node in graph.nodes):
            return graph
        calls = [node for node in graph.nodes if node.op.startswith("call_")]
        if len(calls) <= 1 and not any(node.op == "call_module" for node in calls):
            return None
        known = original_class(module).__module__.startswith("torch.nn.")
        return None if known and not any(children_of(module)) else graph


def _facts(
    module: nn.Module, fqns: Sequence[str], trainable: int, frozen: int, sites: int
) -> tuple[tuple[str, str], ...]:
    cls = original_class(module)
    facts = [("module", fqns[0] or "(root)")]
    if len(fqns) > 1:
        facts.append(("stands for", f"{len(fqns)} equal modules, the last is {fqns[-1]}"))
    facts.append(("class", f"{cls.__module__}.{cls.__qualname__}"))
    if module.extra_repr():
        facts.append(("settings", elide(" ".join(module.extra_repr().split()), 160)))
    for name, tensor in module._parameters.items():
        if tensor is not None:
            trains = "trainable" if tensor.requires_grad else "frozen"
            facts.append((name, f"{size_name(tensor)} {dtype_name(tensor)}, {trains}"))
    if trainable + frozen:
        facts.append(("parameters", f"{trainable:,} trainable, {frozen:,} frozen"))
    if sites:
        facts.append(("adapted sites", str(sites)))
    return tuple(facts)


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def target_name(target: Any) -> str:
    """A readable name for what a node calls, the same in every process."""
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if module.startswith("torch._ops") or name is None:
        return _ADDRESS.sub("", str(target))
    module = "torch.nn.functional" if module == "torch._C._nn" else module.strip("_")
    return f"{module}.{name}" if module else name


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Child modules by name, a module that stands under two names twice."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


class Digests:
    """Hashes that are equal where two modules look the same in a picture.

    A hash covers the class, ``extra_repr``, the shapes of the module's own tensors, the graph with
    its tags, and the same of all children. Ranks count (they are shapes) and so do scales and
    probabilities of dropout (constants of the graph and of modules); values of weights do not.

    Args:
        graphs: The graphs of the regions, by ``id`` of the module.
    """

    def __init__(self, graphs: Mapping[int, fx.Graph]) -> None:
        self._graphs = graphs
        self._known: dict[int, str] = {}

    def __call__(self, module: nn.Module) -> str:
        """The hash of ``module``."""
        known = self._known.get(id(module))
        if known is None:
            text = "\n".join(self._lines(module))
            known = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            self._known[id(module)] = known
        return known

    def _lines(self, module: nn.Module) -> Iterator[str]:
        cls = original_class(module)
        yield f"{cls.__module__}.{cls.__qualname__}({_ADDRESS.sub('', module.extra_repr())})"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name!r} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
        graph = self._graphs.get(id(module))
        for node in graph.nodes if graph is not None else ():
            call = f"{node.op} {node.name} {target_name(node.target)} {node.args} {node.kwargs}"
            yield f"{_ADDRESS.sub('', call)} {node.meta.get(META_KEY)}"
        for name, child in children_of(module):
            yield f"{name!r} {self(child)}"


_OPS = {
    "placeholder": Kind.INPUT,
    "output": Kind.OUTPUT,
    "get_attr": Kind.WEIGHT,
    "call_module": Kind.LEAF,
}


def tag_of(node: fx.Node) -> Tag | None:
    """The node's tag, if it has one."""
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) else None


def adapters_of(graph: fx.Graph) -> list[tuple[str, str]]:
    """The adapters of a graph as pairs of weight and adapter name, each once."""
    tags = (tag_of(node) for node in graph.nodes)
    return list(dict.fromkeys((t.weight, t.adapter) for t in tags if t is not None and t.adapter))


def measured(region: Region, weight: str, adapter: str) -> tuple[int | None, float | None]:
    """Rank and scale of an adapter as the graph has them."""
    rank: int | None = None
    scale: float | None = None
    for node in region.graph.nodes:
        tag = tag_of(node)
        if tag is None or (tag.weight, tag.adapter) != (weight, adapter):
            continue
        if rank is None and tag.role in (Role.FACTOR, Role.DOWN):
            rank = _first_size(region, (node, *node.all_input_nodes))
        if scale is None and tag.role in (Role.SCALE, Role.FUSED):
            scale = next((a for a in node.args if isinstance(a, int | float)), None)
    return rank, scale


def dtype_name(tensor: torch.Tensor) -> str:
    """``float32``, or the format of a quantized weight: ``nf4``."""
    stored = quantization_of(tensor)
    return str(tensor.dtype).removeprefix("torch.") if stored is None else stored.scheme


def size_name(tensor: torch.Tensor) -> str:
    """``128×64``: of the values, for a quantized weight."""
    stored = quantization_of(tensor)
    return times(tuple(tensor.shape) if stored is None else stored.shape)


def node_kind(node: fx.Node) -> Kind:
    """What the node is drawn as."""
    tag = tag_of(node)
    if tag is not None:
        # Roles that are drawn in a way of their own have the names of kinds.
        return next((kind for kind in Kind if kind.value == tag.role.value), Kind.ADAPTER)
    return _OPS.get(node.op, Kind.OP)


def node_name(node: fx.Node) -> str:
    """The first line: what it does, in a word or two."""
    if node.op in ("placeholder", "output"):
        return str(node.target)
    name = target_name(node.target)
    if node.op == "get_attr":
        return name
    # aten.linear.default, but linear and not torch.nn.functional.linear
    atoms = name.split(".")
    return ".".join(atoms[:2]) if isinstance(node.target, torch._ops.OpOverload) else atoms[-1]


def node_caption(node: fx.Node, tensors: Mapping[str, torch.Tensor], p: float | None = None) -> str:
    """The second line: the weight and its shape, or the number that matters.

    Args:
        node: The node.
        tensors: What it reads, by name.
        p: The probability of the dropout that it computes, as it is now; None for none.
    """
    tag = tag_of(node)
    caption = ""
    if tag is not None and tag.role in (Role.SCALE, Role.FUSED):
        caption = next((f"× {a:g}" for a in node.args if isinstance(a, int | float)), "")
        if p is not None:
            caption += f" · p {p:g}"
    elif tag is not None and tag.role is Role.DROPOUT:
        caption = "" if p is None else f"p {p:g}"
    elif tensors:
        name, tensor = next(iter(tensors.items()))
        short = "" if tag is not None else f"{elide(name, 18)} "
        caption = short + size_name(tensor)
    if tag is not None and tag.adapter not in ("", "default"):
        caption = f"{caption} · {tag.adapter}" if caption else tag.adapter
    return caption


def node_facts(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, str]]:
    """The node's part of what hovering shows: the call and the weights that it reads."""
    yield "op", node.op
    if node.op not in ("placeholder", "output"):
        yield "target", target_name(node.target)
    if node.op in ("call_function", "call_method"):
        constants = [f"{key}={value}" for key, value in node.kwargs.items()]
        arguments = ", ".join([*map(str, node.args), *constants])
        yield "call", elide(f"{node_name(node)}({arguments})", 160)
    for name, tensor in tensors.items():
        trains = "trainable" if tensor.requires_grad else "frozen"
        size = f"{size_name(tensor)} {dtype_name(tensor)}"
        yield name, f"{size}, {elements(tensor):,} {trains}"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield "gives", times(tuple(value.shape))


def _first_size(region: Region, nodes: Iterable[fx.Node]) -> int | None:
    tensors = (region.tensor(node) for node in nodes)
    return next((int(t.shape[0]) for t in tensors if t is not None and t.dim() > 0), None)


def parameter_counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Trainable and frozen elements, those of a parameter that is met twice counted once."""
    unique = {id(p): p for p in parameters}.values()
    trainable = sum(elements(p) for p in unique if p.requires_grad)
    return trainable, sum(elements(p) for p in unique) - trainable


class RegionPainter:
    """Paints the graph of one module."""

    def __init__(self, painter: _Painter, module: nn.Module, fqn: str, graph: fx.Graph) -> None:
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
            caption=node_caption(node, tensors, self._probability(node)),
            fqn=self._fqn,
            facts=facts,
            trainable=trainable,
            frozen=frozen,
            adapter=tag.adapter if tag is not None else "",
        )

    def _probability(self, node: fx.Node) -> float | None:
        """That of the dropout in a branch, which a module says."""
        for read in node.all_input_nodes:
            tag = tag_of(read)
            if read.op == "get_attr" and tag is not None and tag.role is Role.DROPOUT:
                value = self._value(str(read.target))
                if not isinstance(value, bool) and isinstance(value, int | float):
                    return float(value)
        return None

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


_PLAN_LEGEND: _Legend = (
    (Kind.SITE, "adapted"),
    (Kind.SKIPPED, "not selected"),
    (Kind.REJECTED, "cannot be adapted"),
)


@dataclasses.dataclass
class _Name:
    """A node of the tree of names: what is at it, and what is below it."""

    row: PlannedSite | Skipped | Rejection | None = None
    below: dict[str, _Name] = dataclasses.field(default_factory=dict)

    def signature(self) -> object:
        """Equal where two names look the same in the picture."""
        below = tuple((name, child.signature()) for name, child in self.below.items())
        return (_look(self.row), below)


def picture_of_plan(plan: Plan) -> Picture:
    """Draws a plan."""
    root = _Name()
    rows: list[tuple[str, PlannedSite | Skipped | Rejection]] = [
        *((row.name, row) for row in plan.sites),
        *((row.site.name, row) for row in plan.skipped),
        *((row.name, row) for row in plan.rejections),
    ]
    for name, row in rows:
        place = root
        for atom in name.split(".") if name else ():
            place = place.below.setdefault(atom, _Name())
        if place.row is None:
            place.row = row
    box = _painted([root], [""], itertools.count())
    return Picture(
        title="Plan",
        facts=(
            ("sites", str(len(plan.sites))),
            ("not selected", str(len(plan.skipped))),
            ("cannot be adapted", str(len(plan.rejections))),
            ("parameters", human(plan.total_parameters)),
            ("trainable", _of_all(plan.trainable_parameters, plan.total_parameters)),
            ("captured by", plan.frontend),
        ),
        root=box,
        legend=_occurring(_PLAN_LEGEND, box),
        notes=tuple(f"matched nothing: {target}" for target in plan.unmatched),
    )


def _painted(nodes: Sequence[_Name], fqns: Sequence[str], ids: Iterator[int]) -> Box:
    """The box of the first of some names, which stands for all: they look the same."""
    node, fqn, box_id = nodes[0], fqns[0], f"n{next(ids)}"
    names, below = list(node.below), list(node.below.values())
    children = tuple(
        _painted([below[i] for i in run], [join(fqn, names[i]) for i in run], ids)
        for run in runs(names, [repr(child.signature()) for child in below])
    )
    kind, caption, facts = _describe(node.row)
    if len(fqns) > 1:
        facts = (("stands for", f"{len(fqns)} equal, the last is {fqns[-1]}"), *facts)
    planned = [row for each in nodes for row in _rows(each) if isinstance(row, PlannedSite)]
    return Box(
        id=box_id,
        kind=kind if not children else Kind.OPAQUE,
        name=name_of(fqns),
        caption=caption,
        fqn=fqn,
        facts=(("name", fqn or "(root)"), *facts),
        children=children,
        repeats=tuple(fqns) if len(fqns) > 1 else (),
        sites=len(planned),
        trainable=sum(row.parameters for row in planned),
    )


def _rows(node: _Name) -> Iterator[PlannedSite | Skipped | Rejection]:
    if node.row is not None:
        yield node.row
    for child in node.below.values():
        yield from _rows(child)


def _short(reason: str) -> str:
    return reason if len(reason) <= 40 else reason[:39].rstrip() + "…"


def _look(row: PlannedSite | Skipped | Rejection | None) -> object:
    kind, caption, _ = _describe(row)
    if isinstance(row, PlannedSite):
        return (kind, caption, row.site.pattern, row.alpha, row.scale, row.dropout)
    return (kind, caption)


def _describe(
    row: PlannedSite | Skipped | Rejection | None,
) -> tuple[Kind, str, tuple[tuple[str, str], ...]]:
    if isinstance(row, PlannedSite):
        site = row.site
        shape = times(site.shape)
        return (
            Kind.SITE,
            f"r {row.rank} · {shape}" if row.rank else f"{row.kind} · {shape}",
            (
                ("pattern", site.pattern),
                ("weight", f"{site.place} {shape}"),
                ("rank", str(row.rank)),
                ("scale", f"{row.scale:g}"),
                ("dropout", f"{row.dropout:g}"),
                ("trainable", f"{row.parameters:,}"),
                ("extra FLOPs a token", f"{row.flops:,}"),
                ("calls", str(len(site.calls))),
            ),
        )
    if isinstance(row, Skipped):
        site = row.site
        shape = times(site.shape)
        facts = (("pattern", site.pattern), ("weight", f"{site.place} {shape}"))
        return Kind.SKIPPED, _short(row.reason), (*facts, ("not selected", row.reason))
    if isinstance(row, Rejection):
        return Kind.REJECTED, _short(row.reason), (("cannot be adapted", row.reason),)
    return Kind.OPAQUE, "", ()
