"""Pictures of models and ONNX files: modules become nested boxes, and equal neighbors become one box."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import inspect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.errors import LoraFxError, some
from lora_fx.export.inspection import FileGraph, FileNode, read_graph
from lora_fx.export.providers import PROVIDERS, PlacementReport, import_onnxruntime
from lora_fx.export.session import OnnxSession
from lora_fx.formats import quantization_of
from lora_fx.ir import Matches, Record, adapters_of, join, tag_of
from lora_fx.passes.capture import CACHE, Listener, normalize, synthesise
from lora_fx.passes.graph import original_class, uninstall
from lora_fx.passes.plan import sample_cost
from lora_fx.tools.draw.picture import (
    Box,
    Branch,
    Kind,
    Picture,
    State,
    elide,
    human,
    label_of,
    name_of,
    nested,
    runs,
    share_of,
    times,
)
from lora_fx.tools.draw.regions import (
    Digests,
    RegionPainter,
    branch_of,
    drawn_children,
    dtype_name,
    own_parameters,
    parameter_counts,
    part_name,
    size_name,
    source_of,
    whole_weight,
)
from lora_fx.tools.draw.sites import (
    costs_of,
    flops_of,
    rows_of_matches,
    rows_of_model,
    skipped_in,
    targets_of,
    unit_of,
    with_losses,
)
from lora_fx.torch_private import pytree

__all__ = ["INPUT", "OUTPUT", "Calls", "calls_of", "picture_of_file", "picture_of_model"]

# --- the calls of modules that have no graph ------------------------------------------------------
# One call without data shows how data flows between modules that have no graph.
#
# A copy of the model on the meta device is called once. Every tensor records the calls from which it
# was computed, so that an output of one module that another module reads becomes an edge, whatever
# happens to it in between.


INPUT = ">"
"""Prefix of an argument's name, for edges that begin at an argument of the box."""

OUTPUT = "<"
"""Name of the box's result, for edges that end there."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """Data flow and shapes in one call of a model.

    Attributes:
        edges: Data flow between a module's children by its FQN, as pairs of child names in the order of
            the calls. Arguments and the result are ends, too.
        shapes: Inputs and outputs of a module in words, by its FQN.
    """

    edges: Mapping[str, tuple[tuple[str, str], ...]]
    shapes: Mapping[str, tuple[str, str]]


def calls_of(model: nn.Module, example_inputs: Any = None) -> Calls | str:
    """Record which module's result goes to which other module.

    Args:
        model: Any module. It is not changed, and its weights are not read.
        example_inputs: As for :func:`lora_fx.capture`; None for inputs that the model's own configuration
            describes.

    Returns:
        The calls, or the reason in words why they are unknown.
    """
    if example_inputs is None:
        synthesis = synthesise(model)
        if synthesis.inputs is None:
            return (
                f"no example inputs: {synthesis.words}; give example_inputs to see how data flows"
            )
        example_inputs = synthesis.inputs
    failure = ""
    # Some operators have a meta kernel only for bfloat16.
    for dtype in (None, torch.bfloat16):
        try:
            return _called(model, example_inputs, dtype)
        except Exception as error:  # noqa: BLE001  whatever the user's code raises without data
            first = next(iter(str(error).splitlines()), "")
            failure = failure or f"a call without data failed: {type(error).__name__}: {first}"
    return failure


def _called(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> Calls:
    """Call a copy over tensors without data, with floating-point tensors in another dtype if one is given."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device="meta")

    copied = _copy(model, empty)
    args, kwargs = pytree.tree_map_only(torch.Tensor, empty, normalize(example_inputs))
    if CACHE in inspect.signature(copied.forward).parameters:
        kwargs.setdefault(CACHE, False)
    # A mask of ones has no effect, and code cannot read its values without data.
    kwargs.pop("attention_mask", None)
    recorder = _Recorder(copied)
    with torch.no_grad(), recorder:
        copied(*args, **kwargs)
    return recorder.calls(with_dtypes=dtype is None)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _copy(model: nn.Module, empty: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a copy with other tensors, in which every module has its own class and no hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=False)
    memo |= {id(buffer): empty(buffer) for buffer in model.buffers()}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        uninstall(module)
        torch_private.remove_forward_hooks(module)
    return copied.eval()


@dataclasses.dataclass
class _Frame:
    """A call that has not returned.

    Attributes:
        fqn: FQN of the module.
        sources: Origins of each tensor by its id: FQNs of calls and names of arguments.
        alive: The tensors, kept alive so that no id is reused.
    """

    fqn: str
    sources: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    alive: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def put(self, tensor: torch.Tensor, sources: tuple[str, ...]) -> None:
        self.sources[id(tensor)] = sources
        self.alive.append(tensor)

    def of(self, value: Any) -> tuple[str, ...]:
        origins = (self.sources.get(id(tensor), ()) for tensor in _tensors(value))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(origins)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    leaves = [value] if isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


_ANSWERS: Mapping[Any, Any] = {
    torch.Tensor.__bool__: True,
    torch.Tensor.__int__: 0,
    torch.Tensor.__index__: 0,
    torch.Tensor.__float__: 0.0,
    torch.Tensor.item: 0,
}
"""Answers to code that asks a tensor without data for a value."""


_Shapes = list[tuple[tuple[int, ...], torch.dtype]]


class _Recorder(Listener):
    """Listener that follows tensors through functions and sees every module enter and leave."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._frames: list[_Frame] = [_Frame("")]
        self._edges: dict[str, dict[tuple[str, str], None]] = {}
        self._shapes: dict[str, tuple[_Shapes, _Shapes]] = {}
        self._first: dict[str, int] = {}
        for fqn, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(fqn, module), with_kwargs=True)
            module.register_forward_hook(self._leaving(fqn), with_kwargs=True)

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _ANSWERS and args[0].device.type == "meta":
            return _ANSWERS[func]
        if func in (torch.nonzero, torch.Tensor.nonzero) and args[0].device.type == "meta":
            return torch.empty(1, args[0].dim(), dtype=torch.long, device="meta")
        return NotImplemented

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        frame = self._frames[-1]
        sources = frame.of((args, kwargs))
        if sources:
            for tensor in _tensors(result):
                frame.put(tensor, sources)

    def _entering(self, fqn: str, module: nn.Module) -> Any:
        signature = inspect.signature(original_class(module).forward)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            outer, frame = self._frames[-1], _Frame(fqn)
            self._first.setdefault(fqn, len(self._first))
            if fqn:
                for source in outer.of((args, kwargs)):
                    self._connect(outer.fqn, source, fqn)
            try:
                bound = signature.bind(module, *args, **kwargs).arguments
            except TypeError:
                bound = {"input": (args, kwargs)}
            for name, value in bound.items():
                named = {name: value} if not isinstance(value, dict) else value
                for key, part in named.items():
                    for tensor in _tensors(part):
                        frame.put(tensor, (f"{INPUT}{key}",))
            self._frames.append(frame)

        return hook

    def _leaving(self, fqn: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
            frame = self._frames.pop()
            for source in frame.of(outputs):
                self._connect(fqn, source, OUTPUT)
            for tensor in _tensors(outputs):
                self._frames[-1].put(tensor, (fqn,))
            input_shapes = [(tuple(t.shape), t.dtype) for t in _tensors((args, kwargs))]
            output_shapes = [(tuple(t.shape), t.dtype) for t in _tensors(outputs)]
            self._shapes.setdefault(fqn, (input_shapes, output_shapes))

        return hook

    def _connect(self, frame: str, source: str, target: str) -> None:
        """Record an edge at the lowest module that contains both ends."""
        if source.startswith(INPUT) or target == OUTPUT:
            owner = frame
        else:
            shared = itertools.takewhile(
                lambda pair: pair[0] == pair[1],
                zip(source.split("."), target.split("."), strict=False),
            )
            owner = ".".join(atom for atom, _ in shared)
        ends = [self._child(owner, end) for end in (source, target)]
        if None not in ends and ends[0] != ends[1]:
            self._edges.setdefault(owner, {})[ends[0], ends[1]] = None  # type: ignore[index]

    def _child(self, owner: str, end: str) -> str | None:
        if end.startswith(INPUT) or end == OUTPUT:
            return end
        if owner and not end.startswith(f"{owner}."):
            return None
        name = end[len(owner) + 1 :] if owner else end
        return name.partition(".")[0] or None

    def calls(self, *, with_dtypes: bool) -> Calls:
        """Return the recorded calls. An edge back to a module that was called earlier is left out."""
        shapes = {
            fqn: (_in_words(inputs, with_dtypes), _in_words(outputs, with_dtypes))
            for fqn, (inputs, outputs) in self._shapes.items()
        }
        edges = {}
        for owner, pairs in self._edges.items():
            order = self._order(owner)
            last = len(order)
            edges[owner] = tuple(
                (a, b)
                for a, b in pairs
                if a.startswith(INPUT) or b == OUTPUT or order.get(a, last) < order.get(b, last)
            )
        return Calls(edges, shapes)

    def _order(self, owner: str) -> dict[str, int]:
        """Return the position of each child's first call, or of the first call inside it."""
        order: dict[str, int] = {}
        for fqn, when in self._first.items():
            child = self._child(owner, fqn) if fqn else None
            if child is not None:
                order.setdefault(child, when)
        return order


def _in_words(tensors: _Shapes, with_dtypes: bool) -> str:
    words = [
        times(shape) + (f" {str(dtype).removeprefix('torch.')}" if with_dtypes else "")
        for shape, dtype in tensors
    ]
    return some(words, 4)


# --- models ---------------------------------------------------------------------------------------


def picture_of_model(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    notes: Sequence[str] = (),
    *,
    matches: Matches | None = None,
    example_inputs: Any = None,
    original: Any = None,
) -> Picture:
    """Draw a model.

    Args:
        model: Any module.
        graphs: The graphs of its regions by key. A module without a graph is a box of its children.
        notes: Remarks for the reader.
        matches: The linear operations of a model that was not rewritten, if they are known.
        example_inputs: Inputs of the call that shows how data flows between modules without a graph; None
            for inputs from the model's own configuration.
        original: The model before it was quantized.
    """
    by_module: dict[int, fx.Graph] = {}
    for key, graph in graphs.items():
        by_module.setdefault(id(model.get_submodule(key)), graph)
    painter = _Painter(model, by_module, matches)
    record = painter.record
    rows = rows_of_model(model, record) if record is not None else ()
    painter.count_in({row.name for row in rows})
    notes = [*notes]
    if any(painter.needs_calls(module) for module in model.modules()):
        calls = calls_of(model, example_inputs)
        if isinstance(calls, Calls):
            painter.calls = calls
        else:
            notes.append(f"modules without a graph stand in order of registration ({calls})")
    root = painter.paint([model], [""])
    total = root.trainable + root.frozen
    if record is None and matches is not None:
        rows = rows_of_matches(matches)
    seen = matches if record is None else record.base.matches
    costs, unit, unknown = _costs(model, record, example_inputs)
    notes += [unknown] if unknown else []
    configs = [adapter.config for adapter in record.adapters.values()] if record is not None else []
    config = configs[0] if configs else None
    if original is not None and any(row.quantized for row in rows):
        rows = with_losses(rows, model, record or matches, original)
    return Picture(
        title=original_class(model).__name__,
        facts=(
            ("parameters", human(total)),
            ("trainable", share_of(root.trainable, total)),
            ("adapted sites", str(root.sites)),
            *costs,
        ),
        root=root,
        notes=tuple(notes),
        adapters=painter.adapters,
        sites=rows,
        targets=() if seen is None else targets_of(seen.sites, seen.rejections, config, model),
        config=config,
        unit=unit,
    )


def _costs(
    model: nn.Module, record: Record | None, example_inputs: Any
) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """Compute the costs of the active adapters.

    Returns:
        The facts to show, the unit of the costs in the table of sites, and a note, which may be empty.
    """
    active = () if record is None else record.active
    rows = [row for name in active if record is not None for row in record.adapters[name].sites]
    unit, each = unit_of(rows), "token"
    flops, saved = sum(row.flops for row in rows), sum(row.saved for row in rows)
    sites = () if record is None else record.base.matches.sites
    share = flops / base if (base := flops_of(sites)) else None
    if unit == "position":
        each = "sample"
        cost = sample_cost(_copy(model, _without_data), rows, example_inputs, unadapted=sites)
        if cost is None:
            return (), unit, "example_inputs= shows what the adapters cost in a sample"
        flops, saved = cost.flops, cost.saved
        share = cost.share
    elif rows and any(site.family == "conv" for site in sites):
        # Positions of a convolution are not tokens. The share is the same for a sample.
        cost = sample_cost(_copy(model, _without_data), rows, example_inputs, sites)
        share = None if cost is None else cost.share
    return costs_of(flops, saved, each, share), unit, ""


class _Painter:
    """Painter of modules. It numbers the boxes in an order that depends only on the model."""

    def __init__(
        self,
        model: nn.Module,
        graphs: Mapping[int, fx.Graph],
        matches: Matches | None = None,
    ) -> None:
        self.graphs = graphs
        self.digest = Digests(graphs)
        self.calls = Calls({}, {})
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = {*self._names.values()}
        self._ids = itertools.count()
        self._drawn: dict[int, str] = {}
        record = model.__dict__.get("_lora_fx")
        self.record = record if isinstance(record, Record) else None
        adapters = {} if self.record is None else self.record.adapters
        self.condense = self.record is not None and self.record.optimize
        self.planned = {
            (row.site.place, name): row
            for name, adapter in adapters.items()
            for row in adapter.sites
        }
        self.rows = {
            (row.site.place, name): len(row.indices)
            for name, adapter in adapters.items()
            for row in adapter.tokens
        }
        active = () if self.record is None else self.record.active
        self.inactive: dict[str, list[str]] = defaultdict(list)
        for weight, name in (*self.planned, *self.rows):
            if name not in active:
                self.inactive[weight].append(name)
        graph_adapters = (name for graph in graphs.values() for _, name in adapters_of(graph))
        self.adapters = tuple(dict.fromkeys((*adapters, *graph_adapters)))
        self._operations: Collection[str] = ()
        self._in_order: list[str] = []
        self._other = self._trained_otherwise()
        self._read_matches(self.record.base.matches if self.record is not None else matches)

    def _trained_otherwise(self) -> dict[str, dict[str, State]]:
        """Return marks for weights that adapters train without factors, with their states, by module FQN."""
        marks: dict[str, dict[str, State]] = defaultdict(dict)
        several = self.record is not None and len(self.record.adapters) > 1
        for name, adapter in self.record.adapters.items() if self.record is not None else ():
            whose = f" {name}" if several else ""
            for fqn in adapter.saved_modules:
                marks[fqn][f"trained in full{whose}"] = State.FULL
            for row in adapter.tokens:
                count = len(row.indices)
                words = f"{count} row{'s' if count > 1 else ''}{whose}"
                marks[row.site.owner][words] = State.ROWS
            for fqn in adapter.biases:
                marks[fqn.rpartition(".")[0]][f"bias{whose}"] = State.NONE
        return marks

    def _read_matches(self, matches: Matches | None) -> None:
        sites = () if matches is None else matches.sites
        rejections = () if matches is None else matches.rejections
        self._unselected = {site.name: "" for site in sites}
        # Parts of fused operations and bare parameters have no box. The box around them has their reasons.
        self._parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for skipped in skipped_in(self.record) if self.record is not None else ():
            site, reason = skipped.site, skipped.reason
            if site.part_of:
                self._parts[site.part_of][reason].append(site.name.rpartition(".")[2])
            elif site.name.startswith(f"{site.owner}.") and site.name not in self._modules:
                self._parts[site.owner][reason].append(site.name.removeprefix(f"{site.owner}."))
            self._unselected[site.name] = reason
        self.unselected = {
            (call.region, call.output): self._unselected[site.name]
            for site in sites
            if site.name not in {row.site.part_of or row.name for row in self.planned.values()}
            for call in site.calls
        }
        self._tied = {site.name: site.tied_to for site in sites if site.tied_to}
        self._rejected = {rejection.name: rejection.reason for rejection in rejections}
        self._refused_parts: dict[str, dict[str, list[str]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for item in rejections:
            owner = item.name.rpartition(".")[0]
            named = {item.name, item.name.removesuffix(".weight")} & self._modules
            is_here = item.region == owner or not item.node
            if owner in self._modules and is_here and not named:
                self._refused_parts[owner][item.reason].append(item.name.rpartition(".")[2])
        self.refused = {(item.region, item.node): item.reason for item in rejections if item.node}

    def new_id(self) -> str:
        """Return the next free id."""
        return f"n{next(self._ids)}"

    def count_in(self, operations: Collection[str]) -> None:
        """Let boxes count the linear operations inside.

        Args:
            operations: The names of all linear operations.
        """
        self._operations, self._in_order = operations, sorted(operations)

    def linear_in(self, fqns: Sequence[str]) -> int:
        """Return the number of linear operations in modules, or 0 without adapters."""
        names = self._in_order
        if "" in fqns:
            return len(names)
        count = sum(fqn in self._operations for fqn in fqns)
        for fqn in fqns:  # "/" is the character after "."
            count += bisect.bisect(names, f"{fqn}/") - bisect.bisect(names, f"{fqn}.")
        return count

    def needs_calls(self, module: nn.Module) -> bool:
        """Return True if only a call can show how data flows between the module's children."""
        return id(module) not in self.graphs and sum(1 for _ in drawn_children(module)) > 1

    def paint(self, modules: Sequence[nn.Module], fqns: Sequence[str]) -> Box:
        """Return the box of ``modules[0]``, which stands for all ``modules``.

        Args:
            modules: Equal modules.
            fqns: Their FQNs.
        """
        module, fqn = modules[0], fqns[0]
        cls = original_class(module).__name__
        graph = self._graph_to_draw(module)
        kids = list(drawn_children(module))
        trainable, frozen = parameter_counts(p for m in modules for p in m.parameters())
        total = trainable + frozen
        sites = sum(map(self._sites, modules))
        name = name_of(fqns)
        facts = (*_facts(module, fqns, trainable, frozen, sites), *self._shapes(module))
        again = self._drawn.setdefault(id(module), fqn)
        if again != fqn and (graph is not None or kids or total):
            facts = (*facts, ("drawn at", again or "(root)"))
            return Box(self.new_id(), Kind.CALL, name, cls, fqn, facts, marks=("shared",))
        box_id = self.new_id()
        kind, flow = Kind.LEAF, False
        children: tuple[Box, ...] = ()
        edges: tuple[tuple[str, str], ...] = ()
        branches: tuple[Branch, ...] = ()
        if graph is not None:
            kind, flow = Kind.MODULE, True
            region = RegionPainter(self, module, fqn, graph)
            children, edges = region.children()
            branches = tuple(region.branches())
            facts += (("graph", f"{len(graph.nodes)} nodes"), *region.hyperparameters())
            if (alone := _only_site(children)) is not None:
                # A module with a single operation is drawn as the operation.
                kind, flow, children, edges = Kind.SITE, False, (), ()
                labels = {label for label, _ in facts}
                facts += tuple(fact for fact in alone.facts if fact[0] not in labels)
        elif kids:
            kind = Kind.OPAQUE
            children, edges, flow = self._called(module, fqn, kids)
            if isinstance(module, nn.ModuleList) and len(children) == 1 and children[0].repeats:
                return children[0]
            known = "as a call without data showed them" if flow else "in order of registration"
            facts += (("graph", f"none: modules {known}"),)
        if not branches:
            branches = tuple(self._switched_off(fqn))
        state, marks, reasons = self._standing(module, fqn, branches)
        times = f"{len(fqns)} × " if len(fqns) > 1 else ""
        size = f" · {times}{human(total // len(fqns))}" if children and total else ""
        return Box(
            id=box_id,
            kind=kind,
            name=name,
            caption=_caption(module) + size,
            fqn=fqn,
            facts=facts + reasons,
            children=children,
            edges=edges,
            flow=flow,
            repeats=tuple(fqns) if len(fqns) > 1 else (),
            sites=sites,
            linear=self.linear_in(fqns),
            trainable=trainable,
            frozen=frozen,
            branches=branches,
            marks=marks,
            state=state,
            parameters=own_parameters(module, fqn, children),
        )

    def _switched_off(self, fqn: str) -> Iterator[Branch]:
        """Yield the adapters on a module's weight, or on parts of it, if none of them is active."""
        weight = join(fqn, "weight")
        for part in (key for key in self.inactive if whole_weight(key) == weight):
            for name in self.inactive[part]:
                row = self.planned.get((part, name))
                if row is None:
                    yield Branch(name, kind=f"{self.rows[part, name]} rows", active=False)
                else:
                    yield branch_of(row, name, part_name(row), active=False)

    def _standing(
        self, module: nn.Module, fqn: str, branches: Sequence[Branch]
    ) -> tuple[State, tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Return a module's state, the marks on its box, and facts about both."""
        other = self._other.get(fqn, {})
        marks = [*other]
        facts: list[tuple[str, str]] = []
        weight = module._parameters.get("weight")
        stored = None if weight is None else quantization_of(weight)
        if stored is not None:
            marks.append(stored.scheme)
            facts.append(("stored", str(stored)))
        if tied := self._tied.get(fqn):
            marks.append("tied")
            facts.append(("tied to", ", ".join(tied)))
        reason = self._rejected.get(fqn) or self._rejected.get(join(fqn, "weight"))
        if reason is not None:
            facts.append(("cannot be adapted", reason))
        facts += [("trained", words) for words in other]
        state = next((known for known in other.values() if known), State.NONE)
        if branches and (state is not State.ROWS or any(branch.rank for branch in branches)):
            state = State.ADAPTED
        elif state is State.NONE and reason is not None:
            state = State.REFUSED
        elif state is State.NONE and fqn in self._unselected:
            state = State.BASE
            if why := self._unselected[fqn]:
                facts.append(("not selected", why))
        skipped, refused = self._parts.get(fqn, {}), self._refused_parts.get(fqn, {})
        bare = [name for names in (*skipped.values(), *refused.values()) for name in names]
        # A module stands for its bare parameters if it has no other linear operations.
        if state is State.NONE and bare and self.linear_in([fqn]) == len(bare):
            state = State.BASE if skipped else State.REFUSED
        for label, parts in (("not selected", skipped), ("cannot be adapted", refused)):
            for why, names in parts.items():
                facts.append((label, f"{', '.join(names)}: {why}"))
        return state, tuple(marks), tuple(facts)

    def _shapes(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        inputs, outputs = self.calls.shapes.get(self._names.get(id(module), ""), ("", ""))
        yield from (("takes", inputs),) if inputs else ()
        yield from (("gives", outputs),) if outputs else ()

    def _called(
        self, module: nn.Module, fqn: str, kids: Sequence[tuple[str, nn.Module]]
    ) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...], bool]:
        """Return the children of a module without a graph, and the data flow that a call has shown."""
        names, modules = zip(*kids, strict=True)
        digests = [self.digest(each) for each in modules]
        boxes: list[Box] = []
        ids: dict[str, str] = {}
        for run in runs(names, digests):
            box = self.paint([modules[i] for i in run], [join(fqn, names[i]) for i in run])
            boxes.append(box)
            ids |= {names[i]: box.id for i in run}
        pairs = self.calls.edges.get(self._names.get(id(module), ""), ())
        inner = [pair for pair in pairs if pair[0] in ids or pair[1] in ids]
        first, last = [], []
        for end in dict.fromkeys(end for pair in inner for end in pair):
            if end.startswith(INPUT):
                first.append(Box(self.new_id(), Kind.INPUT, end.removeprefix(INPUT), fqn=fqn))
                ids[end] = first[-1].id
            elif end == OUTPUT:
                last.append(Box(self.new_id(), Kind.OUTPUT, "output", fqn=fqn))
                ids[end] = last[-1].id
        end_ids = ((ids[a], ids[b]) for a, b in inner if a in ids and b in ids)
        edges = tuple(dict.fromkeys((a, b) for a, b in end_ids if a != b))
        return (*first, *boxes, *last), edges, bool(edges)

    def _sites(self, module: nn.Module) -> int:
        """Return the number of adapted weights in a module. A weight that several graphs read counts once.

        An embedding with trained rows but without an adapter does not count.
        """
        weights = {
            join(name, weight)
            for name, child in module.named_modules()
            if (graph := self.graphs.get(id(child))) is not None
            for weight, adapter in adapters_of(graph)
            if not self._only_rows(id(child), weight, adapter)
        }
        return len(weights)

    def _only_rows(self, module: int, weight: str, adapter: str) -> bool:
        key = (join(self._names.get(module, ""), weight), adapter)
        return key in self.rows and key not in self.planned

    def _graph_to_draw(self, module: nn.Module) -> fx.Graph | None:
        # The inside of nn.ReLU or nn.LayerNorm is not worth drawing, unless it has an adapter. A module
        # with a single operation is drawn as the operation.
        graph = self.graphs.get(id(module))
        if graph is None or any(map(tag_of, graph.nodes)):
            return graph
        calls = [node for node in graph.nodes if node.op.startswith("call_")]
        if len(calls) <= 1 and not any(node.op == "call_module" for node in calls):
            return None
        known = original_class(module).__module__.startswith("torch.nn.")
        return None if known and not any(drawn_children(module)) else graph


def _only_site(children: Iterable[Box]) -> Box | None:
    """Return the adapted operation that is a module's only operation, or None for any other module."""
    inside = [box for box in children if box.kind not in (Kind.INPUT, Kind.OUTPUT)]
    return inside[0] if len(inside) == 1 and inside[0].kind is Kind.SITE else None


def _caption(module: nn.Module) -> str:
    caption = original_class(module).__name__
    weight = module._parameters.get("weight")
    return f"{caption} {size_name(weight)}" if weight is not None and weight.dim() > 1 else caption


def _facts(
    module: nn.Module, fqns: Sequence[str], trainable: int, frozen: int, sites: int
) -> tuple[tuple[str, str], ...]:
    cls, count = original_class(module), len(fqns)
    facts = [("module", fqns[0] or "(root)")]
    if count > 1:
        facts.append(("stands for", f"{count} equal modules, the last is {fqns[-1]}"))
    facts.append(("class", f"{cls.__module__}.{cls.__qualname__}"))
    if source := source_of(cls):
        facts.append(("source", source))
    if module.extra_repr():
        facts.append(("settings", elide(" ".join(module.extra_repr().split()), 160)))
    for name, tensor in module._parameters.items():
        if tensor is not None:
            trains = "trainable" if tensor.requires_grad else "frozen"
            facts.append((name, f"{size_name(tensor)} {dtype_name(tensor)}, {trains}"))
    each = " in each" if count > 1 else ""
    if trainable + frozen:
        words = f"{trainable // count:,} trainable, {frozen // count:,} frozen{each}"
        facts.append(("parameters", words))
    if sites:
        facts.append(("adapted sites", f"{sites // count}{each}"))
    if count > 1:
        total = f"{trainable:,} trainable, {frozen:,} frozen"
        facts.append(("in all", total + (f", {sites} adapted sites" if sites else "")))
    return tuple(facts)


# --- ONNX files -----------------------------------------------------------------------------------


_MOST_BYTES = 2**31
"""Largest size of a file that is loaded to see which provider runs which node."""


def picture_of_file(path: Path, session: OnnxSession | None = None, provider: str = "") -> Picture:
    """Draw an ONNX file.

    Args:
        path: The file.
        session: A session of the file, which knows where its nodes run.
        provider: Provider to use without a session; empty for the CPU's.

    Raises:
        ExportError: If the file or the package onnx is missing or damaged.
    """
    graph = read_graph(path)
    placed = _placement(path, session, provider)
    root = _FilePainter(graph, placed if isinstance(placed, PlacementReport) else None).paint()
    elements = sum(math.prod(shape) for shape, _ in graph.weights.values())
    facts = [("nodes", str(len(graph.nodes))), ("stored values", human(elements))]
    facts += [(key.removeprefix("lora_fx."), value) for key, value in _told(graph)]
    if isinstance(placed, str):
        return Picture(path.name, tuple(facts), root, notes=(placed,))
    facts += [(f"on {_provider_name(name)}", str(count)) for name, count in placed.counts.items()]
    return Picture(path.name, tuple(facts), root)


def _placement(path: Path, session: OnnxSession | None, provider: str) -> PlacementReport | str:
    """Return the provider that ONNX Runtime runs each node on, or the reason why that is unknown."""
    try:
        if session is None:
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}*"))
            if size > _MOST_BYTES:
                return (
                    "draw lora_fx.OnnxSession(path, provider) to see which provider runs which node"
                )
            chosen: Any = provider or "cpu"
            runtime = import_onnxruntime()
            # Without optimizations, which join nodes under new names.
            settings = runtime.SessionOptions()
            settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.log_severity_level = 3
            session = OnnxSession(path, chosen, session_options=settings)
        return session.placement()
    except LoraFxError as error:
        return f"which provider runs which node is not known: {error}"


def _provider_name(provider: str) -> str:
    """Return the name of a provider as users write it."""
    return next((short for short, name in PROVIDERS.items() if name == provider), provider)


def _told(graph: FileGraph) -> Iterator[tuple[str, str]]:
    """Yield short facts from the metadata of a file that lora_fx wrote."""
    for key in ("lora_fx.dtype", "lora_fx.opset"):
        if key in graph.metadata:
            yield key, graph.metadata[key]
    merged = graph.metadata.get("lora_fx.merged")
    if merged is not None:
        yield "merged", ", ".join(json.loads(merged)) or "none"


class _FilePainter:
    """Painter of a file, parents first."""

    def __init__(self, graph: FileGraph, placed: PlacementReport | None) -> None:
        self.graph = graph
        nodes = placed.nodes if placed is not None else ()
        self.places = {node.name: _provider_name(node.provider) for node in nodes}
        self.elsewhere = {node.name for node in placed.elsewhere} if placed is not None else set()
        self._ids = itertools.count()

    def paint(self) -> Box:
        """Return the outermost box."""
        inputs = {name: self._end(Kind.INPUT, name, is_) for name, is_ in self.graph.inputs.items()}
        nodes = [self._node(node) for node in self.graph.nodes]
        outputs = {
            name: self._end(Kind.OUTPUT, name, is_) for name, is_ in self.graph.outputs.items()
        }
        producers = {name: box.id for name, box in inputs.items()}
        edges: list[tuple[str, str]] = []
        for node, box in zip(self.graph.nodes, nodes, strict=True):
            edges += [(producers[name], box.id) for name in node.inputs if name in producers]
            producers |= dict.fromkeys(node.outputs, box.id)
        edges += [(producers[name], box.id) for name, box in outputs.items() if name in producers]
        scopes = [node.scope for node in self.graph.nodes]
        placed = [
            *(((), box) for box in inputs.values()),
            *zip(scopes, nodes, strict=True),
            *(((), box) for box in outputs.values()),
        ]
        children, inner = nested(placed, edges, self._module)
        return dataclasses.replace(self._module("", children, inner), name="graph")

    def _new_id(self) -> str:
        return f"n{next(self._ids)}"

    def _end(self, kind: Kind, name: str, words: str) -> Box:
        return Box(self._new_id(), kind, name, words, facts=((str(kind), name), ("is", words)))

    def _module(
        self, fqn: str, children: tuple[Box, ...], edges: tuple[tuple[str, str], ...]
    ) -> Box:
        facts = (("module", fqn or "(root)"),)
        name = label_of(fqn)
        return Box(self._new_id(), Kind.MODULE, name, "", fqn, facts, children, edges, flow=True)

    def _node(self, node: FileNode) -> Box:
        read = {
            name: self.graph.weights[name] for name in node.inputs if name in self.graph.weights
        }
        first = next(iter(read.values()), None)
        fqn = node.scope[-1] if node.scope else ""
        return Box(
            self._new_id(),
            Kind.OP,
            node.operator,
            "" if first is None else times(first[0]),
            fqn=fqn,
            facts=(
                ("node", node.name),
                ("operator", node.operator),
                ("module", fqn or "(root)"),
                *self._runs_on(node),
                *((name, f"{times(shape)} {dtype}") for name, (shape, dtype) in read.items()),
                ("takes", ", ".join(node.inputs)),
                ("gives", ", ".join(node.outputs)),
            ),
            marks=(*_marks(read), *self._elsewhere(node)),
            state=State.NONE,
            parameters=tuple(read),
        )

    def _runs_on(self, node: FileNode) -> Iterator[tuple[str, str]]:
        if self.places:
            gone = "nothing: ONNX Runtime joins it with others, or computes it as it loads the file"
            yield "runs on", self.places.get(node.name, gone)

    def _elsewhere(self, node: FileNode) -> tuple[str, ...]:
        """Return a mark for a node that runs on another device than requested."""
        return (self.places[node.name],) if node.name in self.elsewhere else ()


def _marks(read: dict[str, tuple[tuple[int, ...], str]]) -> tuple[str, ...]:
    """Return the low-bit dtypes, and a mark for factors of adapters."""
    few = {
        dtype for _, dtype in read.values() if dtype.startswith(("int4", "uint4", "int8", "uint8"))
    }
    lora = {"LoRA" for name in read if ".lora_" in name}
    return (*sorted(few), *lora)
