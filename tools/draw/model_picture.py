"""A model as a picture: modules become nested boxes, equal neighbors become one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import META_KEY, Record, Region, join
from lora_fx.passes.graph import original_class
from lora_fx.tools.draw.picture import Box, Kind, Picture, elide, fold_label, human
from lora_fx.tools.draw.region_picture import (
    Digests,
    RegionPainter,
    adapters_of,
    children_of,
    dtype_name,
    label_of,
    measured,
    parameter_counts,
    runs,
    size_name,
)

__all__ = ["picture_of_model"]

_LEGEND: tuple[tuple[Kind, str], ...] = (
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
        graphs: The graphs of its regions by FQN; a module without one is a box of its children.
        notes: Remarks for the reader.
    """
    by_module = {id(model.get_submodule(name)): graph for name, graph in graphs.items()}
    root = _Painter(model, by_module).paint([model], [""])
    kinds = {box.kind for box in root.walk()}
    total = root.trainable + root.frozen
    share = f" ({100 * root.trainable / total:.3g} %)" if total else ""
    return Picture(
        title=original_class(model).__name__,
        facts=(
            ("parameters", human(total)),
            ("trainable", human(root.trainable) + share),
            ("adapted sites", str(root.sites)),
        ),
        root=root,
        legend=tuple((kind, text) for kind, text in _LEGEND if kind in kinds),
        notes=tuple(notes),
    )


class _Painter:
    """Paints modules; gives every box its id, in an order that depends on the model alone."""

    def __init__(self, model: nn.Module, graphs: Mapping[int, fx.Graph]) -> None:
        self.graphs = graphs
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
        name = label_of(fqn) if fqn else "model"
        if len(fqns) > 1:
            name = fold_label(tuple(label_of(each) for each in fqns))
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
