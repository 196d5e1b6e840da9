"""Models as pictures: modules become nested boxes, equal neighbors become one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import META_KEY, Matches, Record, Region, join, module_of
from lora_fx.passes.graph import original_class
from lora_fx.tools.draw.calls import INPUT, OUTPUT, Calls, calls_of
from lora_fx.tools.draw.nodes import (
    Digests,
    adapters_of,
    drawn_children,
    dtype_name,
    parameter_counts,
    size_name,
    source_of,
)
from lora_fx.tools.draw.picture import (
    Box,
    Branch,
    Kind,
    Picture,
    State,
    elide,
    human,
    name_of,
    occurring,
    runs,
    share_of,
)
from lora_fx.tools.draw.regions import RegionPainter
from lora_fx.tools.draw.sites import rows_of_matches, rows_of_model, why_not, with_losses

__all__ = ["picture_of_model"]


_LEGEND: tuple[tuple[Kind, str], ...] = (
    (Kind.BASE, "base operation"),
    (Kind.DROPOUT, "dropout"),
    (Kind.DOWN, "A: down to the rank"),
    (Kind.UP, "B: up again"),
    (Kind.SCALE, "scale"),
    (Kind.ADD, "add"),
    (Kind.ADAPTER, "other adapter node"),
    (Kind.OPAQUE, "no graph: modules as they are called"),
)


def picture_of_model(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    notes: Sequence[str] = (),
    *,
    matches: Matches | None = None,
    example_inputs: Any = None,
    original: Any = None,
) -> Picture:
    """Draws a model.

    Args:
        model: Any module.
        graphs: The graphs of its regions by key; a module without one is a box of its children. Of a module
            with several forms the first is drawn, and the others are named.
        notes: Remarks for the reader.
        matches: The linear operations of a model that was not rewritten, if they are known.
        example_inputs: What it is called with to see how data flows between modules without a graph;
            None for what its own configuration says.
        original: What a quantized model was before.
    """
    by_module: dict[int, fx.Graph] = {}
    other_forms: dict[int, list[str]] = {}
    for key, graph in graphs.items():
        module = model.get_submodule(module_of(key))
        if by_module.setdefault(id(module), graph) is not graph:
            form = Region.at(key, module, graph).form
            other_forms.setdefault(id(module), []).append(form)
    painter = _Painter(model, by_module, other_forms, matches)
    notes = [*notes]
    if any(painter.needs_calls(module) for module in model.modules()):
        calls = calls_of(model, example_inputs)
        if isinstance(calls, Calls):
            painter.calls = calls
        else:
            notes.append(f"modules without a graph stand in order of registration ({calls})")
    root = painter.paint([model], [""])
    total = root.trainable + root.frozen
    record = painter.record
    rows = rows_of_model(model, record) if record is not None else ()
    if record is None and matches is not None:
        rows = rows_of_matches(matches)
    if original is not None and any(row.quantized for row in rows):
        rows = with_losses(rows, model, record or matches, original)
    return Picture(
        title=original_class(model).__name__,
        facts=(
            ("parameters", human(total)),
            ("trainable", share_of(root.trainable, total)),
            ("adapted sites", str(root.sites)),
        ),
        root=root,
        legend=occurring(_LEGEND, root),
        notes=tuple(notes),
        adapters=painter.adapters,
        sites=rows,
    )


class _Painter:
    """Paints modules; gives every box its id, in an order that depends on the model alone."""

    def __init__(
        self,
        model: nn.Module,
        graphs: Mapping[int, fx.Graph],
        other_forms: Mapping[int, Sequence[str]],
        matches: Matches | None = None,
    ) -> None:
        self.graphs = graphs
        self.other_forms = other_forms
        self.digest = Digests(graphs)
        self.calls = Calls({}, {})
        self._names = {id(module): name for name, module in model.named_modules()}
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
        for place, name in (*self.planned, *self.rows):
            if name not in active:
                self.inactive[place].append(name)
        found = (name for graph in graphs.values() for _, name in adapters_of(graph))
        self.adapters = tuple(dict.fromkeys((*adapters, *found)))
        self._other = self._trained_otherwise()
        self._read_matches(self.record.base.matches if self.record is not None else matches)

    def _trained_otherwise(self) -> dict[str, dict[str, State]]:
        """What else adapters train, in words, by FQN of the module."""
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
        self._unselected = {
            site.name: "" if self.record is None else why_not(site, self.record) for site in sites
        }
        self._tied = {site.name: site.tied_to for site in sites if site.tied_to}
        self._rejected = {one.name: one.reason for one in rejections}
        self.refused = {(one.region, one.node): one.reason for one in rejections if one.node}

    def new_id(self) -> str:
        """The next free id."""
        return f"n{next(self._ids)}"

    def needs_calls(self, module: nn.Module) -> bool:
        """Whether only a call can tell how data flows between what is inside."""
        return id(module) not in self.graphs and sum(1 for _ in drawn_children(module)) > 1

    def paint(self, modules: Sequence[nn.Module], fqns: Sequence[str]) -> Box:
        """The box of ``modules[0]``, which stands for all ``modules`` (they are equal).

        Args:
            modules: The modules.
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
            if forms := self.other_forms.get(id(module)):
                facts += (("other graphs", "; ".join(f"for a call with {form}" for form in forms)),)
            if (alone := _only_site(children)) is not None:
                # A module that does one thing is that thing.
                kind, flow, children, edges = Kind.SITE, False, (), ()
                told = {label for label, _ in facts}
                facts += tuple(fact for fact in alone.facts if fact[0] not in told)
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
        size = human(total // len(fqns))
        if len(fqns) > 1:
            size = f"{len(fqns)} × {size}"
        return Box(
            id=box_id,
            kind=kind,
            name=name,
            caption=_caption(module) + (f" · {size}" if children and total else ""),
            fqn=fqn,
            facts=facts + reasons,
            children=children,
            edges=edges,
            flow=flow,
            repeats=tuple(fqns) if len(fqns) > 1 else (),
            sites=sites,
            trainable=trainable,
            frozen=frozen,
            branches=branches,
            marks=marks,
            state=state,
        )

    def _switched_off(self, fqn: str) -> Iterator[Branch]:
        """Adapters on the weight of a module, none of which is active."""
        place = join(fqn, "weight")
        for name in self.inactive.get(place, ()):
            row = self.planned.get((place, name))
            if row is None:
                yield Branch(name, kind=f"{self.rows[place, name]} rows", active=False)
            else:
                yield Branch(name, row.rank or None, row.scale, row.dropout, row.kind, active=False)

    def _standing(
        self, module: nn.Module, fqn: str, branches: Sequence[Branch]
    ) -> tuple[State, tuple[str, ...], tuple[tuple[str, str], ...]]:
        """What becomes of a module, in a state, in marks on its box, and in facts."""
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
        state = next((one for one in other.values() if one), State.NONE)
        if branches and (state is not State.ROWS or any(one.rank for one in branches)):
            state = State.ADAPTED
        elif state is State.NONE and reason is not None:
            state = State.REFUSED
        elif state is State.NONE and fqn in self._unselected:
            state = State.BASE
            if why := self._unselected[fqn]:
                facts.append(("not selected", why))
        return state, tuple(marks), tuple(facts)

    def _shapes(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        taken, given = self.calls.shapes.get(self._names.get(id(module), ""), ("", ""))
        yield from (("takes", taken),) if taken else ()
        yield from (("gives", given),) if given else ()

    def _called(
        self, module: nn.Module, fqn: str, kids: Sequence[tuple[str, nn.Module]]
    ) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...], bool]:
        """The children of a module without a graph, and the data flow that a call has shown."""
        names, modules = zip(*kids, strict=True)
        digests = [self.digest(each) for each in modules]
        boxes: list[Box] = []
        ids: dict[str, str] = {}
        for run in runs(names, digests):
            box = self.paint([modules[i] for i in run], [join(fqn, names[i]) for i in run])
            boxes.append(box)
            ids |= {names[i]: box.id for i in run}
        found = self.calls.edges.get(self._names.get(id(module), ""), ())
        inner = [pair for pair in found if pair[0] in ids or pair[1] in ids]
        first, last = [], []
        for end in dict.fromkeys(end for pair in inner for end in pair):
            if end.startswith(INPUT):
                first.append(Box(self.new_id(), Kind.INPUT, end.removeprefix(INPUT), fqn=fqn))
                ids[end] = first[-1].id
            elif end == OUTPUT:
                last.append(Box(self.new_id(), Kind.OUTPUT, "output", fqn=fqn))
                ids[end] = last[-1].id
        pairs = ((ids[a], ids[b]) for a, b in inner if a in ids and b in ids)
        edges = tuple(dict.fromkeys((a, b) for a, b in pairs if a != b))
        return (*first, *boxes, *last), edges, bool(edges)

    def _sites(self, module: nn.Module) -> int:
        """Adapted weights inside; one that a graph of the whole model has as well counts once.

        Rows of an embedding that are trained are no site.
        """
        found = {
            join(name, weight)
            for name, child in module.named_modules()
            if (graph := self.graphs.get(id(child))) is not None
            for weight, adapter in adapters_of(graph)
            if not self._only_rows(id(child), weight, adapter)
        }
        return len(found)

    def _only_rows(self, module: int, weight: str, adapter: str) -> bool:
        key = (join(self._names.get(module, ""), weight), adapter)
        return key in self.rows and key not in self.planned

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
        return None if known and not any(drawn_children(module)) else graph


def _only_site(children: Iterable[Box]) -> Box | None:
    """The adapted operation that is all that a module does; None for any other module."""
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
