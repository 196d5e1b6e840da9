"""The graph of one module as boxes: nodes, the weights that they read, and adapters on operations."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import networkx as nx
import torch
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.formats import quantization_of
from lora_fx.ir import PlannedSite, Region, Role, adapters_of, join, tag_of
from lora_fx.passes.capture import MODULE_STACK
from lora_fx.passes.graph import elements, original_class
from lora_fx.runtime import in_place
from lora_fx.runtime.modules import AdapterModule
from lora_fx.tools.draw.picture import (
    Box,
    Branch,
    Kind,
    State,
    elide,
    follows,
    human,
    label_of,
    nested,
    times,
)
from lora_fx.tools.draw.sites import cost_facts

__all__ = [
    "Digests",
    "Host",
    "RegionPainter",
    "branch_of",
    "children_of",
    "drawn_children",
    "dtype_name",
    "is_item",
    "measured",
    "node_caption",
    "node_facts",
    "node_kind",
    "node_name",
    "own_parameters",
    "parameter_counts",
    "part_name",
    "size_name",
    "source_of",
    "target_name",
    "whole_weight",
]

# --- texts about nodes, weights and modules -------------------------------------------------------


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def target_name(target: Any) -> str:
    """Return a readable name of a node's target, the same in every process."""
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if module.startswith("torch._ops") or name is None:
        return _ADDRESS.sub("", str(target))
    module = "torch.nn.functional" if module == "torch._C._nn" else module.strip("_")
    return f"{module}.{name}" if module else name


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield child modules by name. A module with two names comes twice."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def drawn_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the child modules, except modules that only hold the parameters of adapters."""
    return (pair for pair in children_of(module) if not isinstance(pair[1], AdapterModule))


class Digests:
    """Hashes that are equal if two modules look the same in a picture.

    A hash covers the class, ``extra_repr``, the shapes of the module's own tensors, the graph with
    its tags, and the same of all children. Ranks count (they are shapes) and so do scales and
    probabilities of dropout (constants of the graph and of modules). Values of weights do not.

    Args:
        graphs: The graphs of the regions, by ``id`` of the module.
    """

    def __init__(self, graphs: Mapping[int, fx.Graph]) -> None:
        self._graphs = graphs
        self._known: dict[int, str] = {}

    def __call__(self, module: nn.Module) -> str:
        """Return the hash of ``module``."""
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
            yield f"{_ADDRESS.sub('', call)} {tag_of(node)}"
        for name, child in children_of(module):
            yield f"{name!r} {self(child)}"


_OPS = {
    "placeholder": Kind.INPUT,
    "output": Kind.OUTPUT,
    "get_attr": Kind.WEIGHT,
    "call_module": Kind.LEAF,
}


def measured(region: Region, weight: str, adapter: str) -> tuple[int | None, float | None]:
    """Return rank and scale of an adapter from the graph."""
    factors: dict[str, torch.Tensor] = {}
    scale: float | None = None
    for node in region.graph.nodes:
        tag = tag_of(node)
        if tag is None or (tag.weight, tag.adapter) != (weight, adapter):
            continue
        tensor = region.tensor(node) if tag.role is Role.FACTOR else None
        if tensor is not None:
            factors.setdefault(str(node.target), tensor)
        if scale is None and tag.role in (Role.SCALE, Role.FUSED):
            scale = _scale_in(node)
    return _common_rank([*factors.values()]), scale


def _common_rank(factors: Sequence[torch.Tensor]) -> int | None:
    """Return the size that A, ``[r, ...]``, and B, ``[out, r, ...]``, share.

    Experts are the first dimension of both factors or of neither.
    """
    if len(factors) < 2 or any(factor.dim() < 2 for factor in factors[:2]):
        return None
    a, b = factors[:2]
    stacked = a.dim() == 3 and b.dim() == 3 and a.shape[0] == b.shape[0] and b.shape[2] != 1
    return int(a.shape[1 if stacked else 0])


def _scale_in(node: fx.Node) -> float | None:
    """Return the scale of a branch. A node that reads one output of a fused product has its own scale."""
    if is_item(node):
        product, index = node.args
        scales = next((a for a in _arguments(product) if _are_numbers(a)), ())
        return float(scales[index]) if isinstance(index, int) and index < len(scales) else None
    several = next((a for a in node.args if _are_numbers(a)), None)
    if isinstance(several, list | tuple):
        return float(several[0])
    return next((float(a) for a in node.args if isinstance(a, int | float)), None)


def _arguments(node: Any) -> tuple[Any, ...]:
    return node.args if isinstance(node, fx.Node) else ()


def _are_numbers(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(isinstance(item, int | float) for item in value)


def is_item(node: fx.Node) -> bool:
    """Return True if a node reads one of the outputs of a product of several operations."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def dtype_name(tensor: torch.Tensor) -> str:
    """Return ``float32``, or the format of a quantized weight such as ``nf4``."""
    stored = quantization_of(tensor)
    return str(tensor.dtype).removeprefix("torch.") if stored is None else stored.scheme


def size_name(tensor: torch.Tensor) -> str:
    """Return the shape as ``128×64``. For a quantized weight it is the shape of the values."""
    stored = quantization_of(tensor)
    if stored is None or stored.stacked is not None:
        return times(tuple(tensor.shape))
    return times(stored.shape)


def node_kind(node: fx.Node) -> Kind:
    """Return the kind of a node's box."""
    tag = tag_of(node)
    if tag is not None:
        # Roles with their own drawing have the names of kinds.
        return next((kind for kind in Kind if kind.value == tag.role.value), Kind.ADAPTER)
    return _OPS.get(node.op, Kind.OP)


def node_name(node: fx.Node) -> str:
    """Return the first line of a node's box: its operation, in a word or two."""
    if node.op in ("placeholder", "output"):
        return str(node.target)
    if node.target is in_place:  # x += y, in torch's words
        return f"{str(node.args[0])[1:]}_"
    name = target_name(node.target)
    if node.op == "get_attr":
        return name
    # aten.linear.default, but linear and not torch.nn.functional.linear
    atoms = name.split(".")
    return ".".join(atoms[:2]) if isinstance(node.target, torch_private.OpOverload) else atoms[-1]


def node_caption(node: fx.Node, tensors: Mapping[str, torch.Tensor], p: float | None = None) -> str:
    """Return the second line: the weight and its shape, or the number that matters.

    Args:
        node: The node.
        tensors: Tensors that it reads, by name.
        p: Current probability of the dropout that it computes; None without dropout.
    """
    tag = tag_of(node)
    caption = ""
    if tag is not None and tag.role in (Role.SCALE, Role.FUSED):
        scale = _scale_in(node)
        caption = "" if scale is None else f"× {scale:g}"
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
    """Yield the node's facts for hovering: the call and the weights that it reads."""
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
        yield "gives", f"{times(tuple(value.shape))} {dtype_name(value)}"
    trace = node.meta.get("stack_trace")
    if isinstance(trace, str) and (lines := _LINE.findall(trace)):
        yield "source", f"{short_path(lines[-1][0])}:{lines[-1][1]}"


_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def short_path(path: str) -> str:
    """Return a path relative to the packages folder, or only the file's name: equal on every machine."""
    path = path.replace("\\", "/")
    for folder in ("site-packages/", "dist-packages/"):
        if folder in path:
            return path.rpartition(folder)[2]
    return path.rpartition("/")[2]


def source_of(cls: type[nn.Module]) -> str:
    """Return file and line of a class's forward, or "" without Python code."""
    forward: Any = getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None)  # decorators have their own
    return "" if code is None else f"{short_path(code.co_filename)}:{code.co_firstlineno}"


def parameter_counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Count trainable and frozen elements. A parameter that occurs twice counts once."""
    unique = {id(p): p for p in parameters}.values()
    trainable = sum(elements(p) for p in unique if p.requires_grad)
    return trainable, sum(elements(p) for p in unique) - trainable


def own_parameters(module: nn.Module, fqn: str, children: Iterable[Box]) -> tuple[str, ...]:
    """Return the names of a module's parameters that no box inside stands for.

    Args:
        module: The module.
        fqn: Its FQN.
        children: The boxes inside.
    """
    inside = {name for box in children if box.fqn != fqn for name in box.repeats or (box.fqn,)}

    def is_inside(name: str) -> bool:
        full_name = join(fqn, name)
        ends = (index for index, letter in enumerate(full_name) if letter == ".")
        return any(full_name[:end] in inside for end in ends)

    return tuple(name for name, _ in module.named_parameters() if not is_inside(name))


# --- the graph of one module ----------------------------------------------------------------------


class Host(Protocol):
    """Interface through which the painter of a region uses the painter of the whole model."""

    @property
    def digest(self) -> Digests:
        """Return the digests of modules, equal for modules that look the same."""

    @property
    def condense(self) -> bool:
        """Return True if an operation and its adapters are drawn as one box."""

    @property
    def planned(self) -> Mapping[tuple[str, str], PlannedSite]:
        """Return the planned sites by place (the weight, with rows for a part of it) and adapter."""

    @property
    def rows(self) -> Mapping[tuple[str, str], int]:
        """Return the number of rows of a weight that an adapter trains, by place and adapter."""

    @property
    def inactive(self) -> Mapping[str, Sequence[str]]:
        """Return the adapters that are in no graph now, by place."""

    @property
    def unselected(self) -> Mapping[tuple[str, str], str]:
        """Return the reason why no adapter is on an operation, "" if unknown, by region and node."""

    @property
    def refused(self) -> Mapping[tuple[str, str], str]:
        """Return the reason why an operation cannot have an adapter, by region and node."""

    def new_id(self) -> str:
        """Return the next free id."""

    def linear_in(self, fqns: Sequence[str]) -> int:
        """Return the number of linear operations in modules, or 0 without adapters."""

    def paint(self, modules: Sequence[nn.Module], fqns: Sequence[str]) -> Box:
        """Return the box of equal modules."""


_ON_OPERATION = frozenset(Role) - {Role.FACTOR, Role.CAST}


def _adapter_of(node: fx.Node) -> str:
    tag = tag_of(node)
    return "" if tag is None else tag.adapter


def whole_weight(weight: str) -> str:
    """Return the weight without the rows that name a part of it, as in ``weight[0:32]``."""
    return weight.partition("[")[0]


def part_name(row: PlannedSite) -> str:
    """Return the name of a part of a fused operation, such as ``v``, or "" for a whole operation."""
    return row.name.rpartition(".")[2] if row.site.part_of else ""


def branch_of(row: PlannedSite, adapter: str, label: str, *, active: bool) -> Branch:
    """Return the adapter of a planned site as it is drawn.

    Args:
        row: The site.
        adapter: Name of the adapter.
        label: Name of the weight or part; "" if the operation has only one.
        active: True if the adapter is in the graph that runs.
    """
    return Branch(adapter, row.rank or None, row.scale, row.dropout, row.kind, label, active)


def _is(node: fx.Node, role: Role) -> bool:
    tag = tag_of(node)
    return tag is not None and tag.role is role


def _is_fused_item(source: fx.Node, node: fx.Node) -> bool:
    """Return True if a node reads its output from a product of several adapted operations."""
    before, after = tag_of(source), tag_of(node)
    if before is None or after is None:
        return False
    return before.role is Role.FUSED and after.role is Role.FUSED and is_item(node)


def _weights_in_words(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> str:
    """Return the sizes of weights, with the weight's name if it is informative."""
    sizes = ", ".join(dict.fromkeys(map(size_name, tensors)))
    name = names[0].removesuffix("weight").strip(".").rpartition(".")[2]
    return sizes if len(names) > 1 or not name else f"{elide(name, 26)} {sizes}"


def _stored(tensor: torch.Tensor) -> str:
    """Return the storage format of a quantized weight, or ""."""
    stored = quantization_of(tensor)
    return "" if stored is None else stored.scheme


class RegionPainter:
    """Painter of the graph of one module."""

    def __init__(self, painter: Host, module: nn.Module, fqn: str, graph: fx.Graph) -> None:
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
        self._sites = self._grouped() if painter.condense else {}
        stacks = (node.meta.get(MODULE_STACK) for node in graph.nodes)
        self._staged = {fqn for stack in stacks if isinstance(stack, tuple) for fqn in stack}

    def children(self) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
        """Return the boxes inside the region and the edges between them."""
        runs = self._runs()
        groups = [*runs, *self._sites.values()]
        first = {node: group[0] for group in groups for node in group}
        folded = {run[0]: run for run in runs}
        boxes: dict[fx.Node, Box] = {}
        for node in self._inputs:
            if first.get(node, node) is not node:
                continue
            if node in self._sites:
                boxes[node] = self._site(self._sites[node])
            else:
                boxes[node] = self._box(node, folded.get(node, [node]))
        edges: dict[tuple[str, str], None] = {}
        for node, inputs in self._inputs.items():
            for source in inputs:
                a, b = (boxes[first.get(each, each)].id for each in (source, node))
                if a != b:
                    edges[a, b] = None
        paths = {node: self._path([*self._sites.get(node, ()), node]) for node in boxes}
        if not any(paths.values()):
            return (*boxes.values(), *self._uncalled()), tuple(edges)
        # In a graph of the whole model, nest nodes in their original modules.
        placed = [(paths[node], box) for node, box in boxes.items()]
        return nested(placed, edges, self._module)

    def _path(self, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        """Return the FQNs of a node's original modules if the graph contains several modules."""
        for node in nodes:
            if isinstance(stack := node.meta.get(MODULE_STACK), tuple):
                return stack
        # A node of an adapter belongs to its weight's module and the modules around it.
        for node in nodes:
            tag = tag_of(node)
            if tag is not None and self._staged:
                atoms = tag.weight.split(".")[:-1]
                names = (".".join(atoms[:end]) for end in range(1, len(atoms) + 1))
                owner = ".".join(atoms)
                return tuple(name for name in names if name in self._staged or name == owner)
        return ()

    def _module(
        self, name: str, children: tuple[Box, ...], edges: tuple[tuple[str, str], ...]
    ) -> Box:
        """Return the box of a module in a graph of the whole model."""
        fqn = join(self._fqn, name)
        module = self._region.module.get_submodule(name)
        cls = original_class(module)
        trainable, frozen = parameter_counts(module.parameters())
        facts = [("module", fqn), ("class", f"{cls.__module__}.{cls.__qualname__}")]
        facts += [("source", source)] if (source := source_of(cls)) else []
        if trainable + frozen:
            facts.append(("parameters", f"{trainable:,} trainable, {frozen:,} frozen"))
        size = f" · {human(trainable + frozen)}" if trainable + frozen else ""
        return Box(
            id=self._painter.new_id(),
            kind=Kind.MODULE,
            name=label_of(name),
            caption=cls.__name__ + size,
            fqn=fqn,
            facts=tuple(facts),
            children=children,
            edges=edges,
            flow=True,
            sites=sum(
                box.sites or len({branch.weight for branch in box.branches}) for box in children
            ),
            linear=self._painter.linear_in([fqn]),
            trainable=trainable,
            frozen=frozen,
            parameters=own_parameters(module, fqn, children),
        )

    def hyperparameters(self) -> tuple[tuple[str, str], ...]:
        """Return rank, scale and costs of each adapter in the region, as facts."""
        facts: list[tuple[str, str]] = []
        for weight, adapter in adapters_of(self._region.graph):
            values = self._hyper(weight, adapter)
            text = ", ".join(f"{label} {value}" for label, value in values)
            facts.append((f"adapter {adapter}", f"on {weight}" + (text and f": {text}")))
        return tuple(facts)

    def _grouped(self) -> dict[fx.Node, list[fx.Node]]:
        """Return adapted operations by first node, each with the nodes of its branches.

        Connected nodes belong together if they have the same weight. A product of several operations is one
        group.
        """
        tagged = {node: weight for node in self._inputs if (weight := self._weight_of(node))}
        together = nx.Graph()
        together.add_nodes_from(tagged)
        for node in tagged:
            for source in self._inputs[node]:
                if source in tagged and (
                    whole_weight(tagged[source]) == whole_weight(tagged[node])
                    or _is_fused_item(source, node)
                ):
                    together.add_edge(source, node)
        order = {node: index for index, node in enumerate(self._inputs)}
        components = (
            sorted(each, key=order.__getitem__) for each in nx.connected_components(together)
        )
        groups = {each[0]: each for each in components if any(_adapter_of(node) for node in each)}
        leader = {node: each[0] for each in groups.values() for node in each}
        contracted = nx.DiGraph(
            (leader.get(source, source), leader.get(node, node))
            for node, sources in self._inputs.items()
            for source in sources
            if leader.get(source, source) is not leader.get(node, node)
        )
        return groups if nx.is_directed_acyclic_graph(contracted) else {}

    def _weight_of(self, node: fx.Node) -> str:
        """Return the adapted weight whose operation contains a node, or ""."""
        tag = tag_of(node)
        if tag is not None:
            return tag.weight if tag.role in _ON_OPERATION else ""
        # An operation whose result is only read by its branches is not always tagged.
        users = {other.weight if (other := tag_of(user)) else "" for user in node.users}
        read = {self._weights[n] for n in node.all_input_nodes if n in self._weights}
        return next(iter(users)) if len(users) == 1 and users <= read else ""

    def _site(self, nodes: list[fx.Node]) -> Box:
        """Return the box of an operation with its adapters."""
        fused = [n for n in nodes if _is(n, Role.FUSED)] or [n for n in nodes if _is(n, Role.BASE)]
        # Views of the weight are tagged, too. The node with the most inputs is the computation.
        main = max(fused or nodes, key=lambda node: len(node.all_input_nodes))
        weights = list(dict.fromkeys(tag.weight for n in nodes if (tag := tag_of(n)) is not None))
        branches = tuple(self.branches(weights))
        whole = list(dict.fromkeys(map(whole_weight, weights)))
        base = [self._value(weight) for weight in whole if self._has(weight)]
        tensors = [value for value in base if isinstance(value, torch.Tensor)]
        trainable, frozen = parameter_counts(
            parameter
            for node in nodes
            for parameter in self._read(node).values()
            if isinstance(parameter, nn.Parameter)
        )
        facts = dict.fromkeys(
            (
                ("node", ", ".join(node.name for node in nodes)),
                ("module", self._fqn or "(root)"),
                ("class", original_class(self._region.module).__name__),
                *(("adapts", join(self._fqn, weight)) for weight in weights),
                *(fact for node in nodes for fact in node_facts(node, self._read(node))),
            )
        )
        stored = {name for tensor in tensors if (name := _stored(tensor))}
        return Box(
            id=self._painter.new_id(),
            kind=Kind.SITE,
            name=node_name(main),
            caption=_weights_in_words(whole, tensors),
            fqn=self._fqn,
            facts=tuple(facts),
            trainable=trainable,
            frozen=frozen,
            adapter=branches[0].adapter if branches else "",
            branches=branches,
            marks=tuple(sorted(stored)),
            state=State.ADAPTED,
        )

    def branches(self, weights: Iterable[str] | None = None) -> Iterator[Branch]:
        """Yield the adapters on some weights, inactive adapters last.

        Args:
            weights: Names in the region; None for all that have an adapter.
        """
        adapters = adapters_of(self._region.graph)
        if weights is None:
            weights = dict.fromkeys(weight for weight, _ in adapters)
        weights = list(weights)
        names = {weight: self._name_of(weight) for weight in weights}
        short = {weight: name.rpartition(".")[2] for weight, name in names.items()}
        if len({*short.values()}) == len(short):
            names = short
        for weight in weights:
            label = names[weight] if len(weights) > 1 or weight != whole_weight(weight) else ""
            for adapter in (adapter for name, adapter in adapters if name == weight):
                yield self._branch(weight, adapter, label)
            for adapter in self._painter.inactive.get(join(self._fqn, weight), ()):
                yield self._branch(weight, adapter, label, active=False)

    def _name_of(self, weight: str) -> str:
        """Return the name of the operation that reads a weight. An adapted one has the name of its site."""
        full_name = join(self._fqn, weight)
        planned = (row for (at, _), row in self._painter.planned.items() if at == full_name)
        row = next(planned, None)
        return weight.removesuffix(".weight") if row is None else row.name

    def _branch(self, weight: str, adapter: str, label: str, *, active: bool = True) -> Branch:
        planned = self._painter.planned.get((join(self._fqn, weight), adapter))
        rows = self._painter.rows.get((join(self._fqn, weight), adapter))
        if rows is not None:
            return Branch(adapter, kind=f"{rows} rows", weight=label, active=active)
        if planned is None:
            rank, scale = measured(self._region, weight, adapter)
            return Branch(adapter, rank, scale, weight=label, active=active)
        return branch_of(planned, adapter, label, active=active)

    def _has(self, name: str) -> bool:
        try:
            self._value(name)
        except AttributeError:
            return False
        return True

    def _read(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Return the tensors that a node reads, by name."""
        names = [self._weights[n] for n in node.all_input_nodes if n in self._weights]
        values = {name: self._value(name) for name in names}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def _absorb(self, node: fx.Node) -> None:
        """Merge a weight, and the cast of a factor, into the operations that read it."""
        tag = tag_of(node)
        readers = {user.op for user in node.users}
        if node.op == "get_attr":
            # Other attributes that a tagged node reads are switches, as dropout's self.training.
            part = self._region.tensor(node) is not None or tag is not None
            if part and readers <= {"call_function", "call_method"}:
                self._weights[node] = str(node.target)
        elif tag is not None and tag.role is Role.CAST and "output" not in readers:
            # A cast reads other inputs only for their dtype.
            source = next(iter(node.all_input_nodes), None)
            if source in self._weights:
                self._weights[node] = self._weights[source]

    def _runs(self) -> list[list[fx.Node]]:
        """Return chains of calls of equal modules that are numbered in sequence."""
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
        """Return child modules with parameters that the graph neither calls nor reads."""
        graph = self._region.graph
        called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        boxes: list[Box] = []
        for name, child in drawn_children(self._region.module):
            if any(target == name or target.startswith(f"{name}.") for target in called):
                continue
            own = {f"{name}.{parameter}" for parameter, _ in child.named_parameters()}
            if own - read:
                boxes.append(self._painter.paint([child], [join(self._fqn, name)]))
        return tuple(boxes)

    def _node(self, node: fx.Node) -> Box:
        tensors = self._read(node)
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
        reason = self._painter.refused.get((self._fqn, node.name))
        why = self._painter.unselected.get((self._fqn, node.name))
        state = State.NONE if tag is not None or why is None else State.BASE
        if reason is not None:
            facts += (("cannot be adapted", reason),)
            state = State.REFUSED
        elif state and why:
            facts += (("not selected", why),)
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
            state=state,
        )

    def _probability(self, node: fx.Node) -> float | None:
        """Return the dropout probability of a branch, from its module."""
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
            return (
                ("rank", str(planned.rank)),
                ("scale", f"{planned.scale:g}"),
                *((("dropout", f"{planned.dropout:g}"),) if planned.dropout else ()),
                *cost_facts(planned),
            )
        rank, scale = measured(self._region, weight, adapter)
        values = (("rank", rank), ("scale", scale))
        return tuple((label, f"{value:g}") for label, value in values if value is not None)
