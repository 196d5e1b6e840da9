"""Walks the module tree and gives a graph to every module whose ``forward`` traces.

A module without a graph keeps its own ``forward``, and its children are looked at one by one: in
the worst case each linear layer is a region of one operation. Modules over no matrix are left
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import Capture, Region, Site, join
from lora_fx.passes.capture.decompositions import (
    make_opaque,
    setup_of,
    written_conditions,
    written_out,
)
from lora_fx.passes.capture.trace import Untraceable, trace
from lora_fx.passes.graph import (
    UNINITIALIZED,
    is_built_in,
    is_lazy,
    is_matrix,
    kept_graph,
    uninstall,
    wraps_own_forward,
)
from lora_fx.passes.patterns import patterns

__all__ = ["Graphs", "find_regions"]

# Modules of torch.nn that are one linear operation: their forward is worth a graph.
_OPERATIONS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
)


def find_regions(model: nn.Module) -> Capture:
    """Captures every module that can be captured.

    Args:
        model: The model, from :func:`share_copy`.

    Returns:
        The regions by FQN, parents before children; for every other module that holds a matrix the
        reason why it has none, and what was traced of it until then.
    """
    regions: dict[str, Region] = {}
    opaque: dict[str, str] = {}
    begun: dict[str, fx.Graph] = {}
    seen: set[nn.Module] = set()
    holders = _holders(model)
    graphs = Graphs()
    kept = {module: found for module in model.modules() if (found := kept_graph(module))}
    for module in kept:
        uninstall(module)

    def add(module: nn.Module, fqn: str, graph: fx.Graph, doubt: str = "") -> None:
        written = written_out(module) is not None
        regions[fqn] = Region(
            fqn, module, graph, module not in kept, written_out=written, not_run=doubt
        )

    def visit(module: nn.Module, fqn: str) -> None:
        if module in seen or module not in holders:
            return
        seen.add(module)
        sealed = None if module in kept else _why_sealed(module)
        if sealed is not None:
            opaque[fqn] = sealed
            return
        if module in kept:
            add(module, fqn, kept[module])
        elif not _container(module):
            try:
                add(module, fqn, *graphs.of(module))
            except Untraceable as reason:
                if (graph := graphs.as_layer(module)) is not None:
                    add(module, fqn, graph, str(reason))
                    return
                opaque[fqn] = str(reason)
                if reason.begun is not None:
                    begun[fqn] = reason.begun
        for name, child in module.named_children():
            visit(child, join(fqn, name))

    visit(model, "")
    return Capture(model, regions, "regions", opaque=opaque, begun=begun)


class Graphs:
    """Traces modules; those that agree in all that a trace depends on get the same graph."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[fx.Graph, str]] = {}
        self._kinds: set[Any] = set()
        self._failed: dict[Any, Untraceable] = {}

    def of(self, module: nn.Module) -> tuple[fx.Graph, str]:
        """Return the graph of a module's forward, and why it must not run; empty if it may.

        Raises:
            Untraceable: With the reason in words.
        """
        if "forward" in module.__dict__ and not wraps_own_forward(module):
            raise Untraceable("its forward was replaced on the instance")
        kind = _kind(module)
        # What agrees in everything is of one kind: of others the structure need not be looked at.
        if kind in self._kinds and (known := self._known.get(_structure(module))) is not None:
            return known
        if kind in self._failed:
            raise self._failed[kind]
        forward = written_out(module)
        try:
            if forward is None:
                graph, doubt = trace(module, check_none=not is_built_in(module))
            else:
                more = written_conditions(module)
                graph, doubt = trace(module, {}, check_none=False, forward=forward, conditions=more)
        except Untraceable as reason:
            self._failed[kind] = reason
            raise
        made = make_opaque(graph, module), doubt
        layer = self.as_layer(module) if _computes_with_its_weight(module, graph) else None
        if layer is not None:
            made = layer, "it computes with its weight before it applies it"
        # A trace leaves the module as it was.
        self._known[_structure(module)] = made
        self._kinds.add(kind)
        return made

    def as_layer(self, module: nn.Module) -> fx.Graph | None:
        """Return the graph of the layer of PyTorch that a module is a subclass of, which shows its operation.

        Its own forward may do anything else, too: it reads the weight with its adapters.
        """
        for cls in type(module).__mro__:
            if cls in _OPERATIONS and _has_its_own_forward(module, cls):
                try:
                    return trace(module, check_none=False, forward=cls.forward)[0]
                except Untraceable:
                    return None
        return None


def _computes_with_its_weight(module: nn.Module, graph: fx.Graph) -> bool:
    """Return True for a layer of another class that reads its weight, and does not apply it as it is."""
    if not any(
        cls in _OPERATIONS and _has_its_own_forward(module, cls) for cls in type(module).__mro__
    ):
        return False
    region = Region("", module, graph)
    weights = [node for node in graph.nodes if node.op == "get_attr" and node.target == "weight"]
    applied = any(
        isinstance(seen := pattern.match(node, region), Site) and seen.weight == "weight"
        for node in graph.nodes
        for pattern in patterns()
    )
    return any(node.users for node in weights) and not applied


def _has_its_own_forward(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return True if a layer does not run the forward of a class, but its own or one on the instance."""
    return "forward" in module.__dict__ or type(module).forward is not cls.forward


def _holders(model: nn.Module) -> set[nn.Module]:
    """The modules with a parameter of two or more dimensions anywhere below them."""
    found: set[nn.Module] = set()

    def holds(module: nn.Module) -> bool:
        own = any(map(is_matrix, module._parameters.values())) or _is_uninitialized(module)
        # All of them are asked, also after one has answered.
        below = [holds(child) for child in module.children()]
        if own or any(below):
            found.add(module)
            return True
        return False

    holds(model)
    return found


_OWN = frozenset(nn.Module().__dict__)
_SIMPLE = (bool, int, float, str, type(None))
_COMMON = frozenset({bool, int, str, type(None)})


def _structure(module: nn.Module, seen: dict[int, int] | None = None) -> tuple[Any, ...]:
    """All that a trace can depend on: modules that agree in it are traced once and share their graph.

    An attribute that cannot be compared stands for itself, so that only the very same object
    agrees.
    What occurs twice within the module is numbered: a graph calls it by the first of its names.
    """
    seen = {} if seen is None else seen
    number = seen.setdefault(id(module), len(seen))
    setup = setup_of(module)
    if setup is not None:
        return (type(module), number, setup)

    def tensors(named: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(
            (k, seen.setdefault(id(v), len(seen))) for k, v in named.items() if v is not None
        )

    return (
        type(module),
        number,
        tensors(module._parameters),
        # The shape of a parameter is a number to a trace.
        tuple(_shape(p) for p in module._parameters.values() if p is not None),
        tensors(module._buffers),
        tuple((name, _value(v)) for name, v in module.__dict__.items() if name not in _OWN),
        tuple(
            (name, _structure(child, seen))
            for name, child in module._modules.items()
            if child is not None
        ),
    )


def _shape(parameter: nn.Parameter) -> tuple[Any, ...]:
    return () if is_lazy(parameter) else (*parameter.shape, quantization_of(parameter))


def _value(value: Any) -> Any:
    if type(value) in _COMMON:
        return (type(value), value)
    if isinstance(value, float):
        # 0.0 == -0.0, and what divides by them tells them apart.
        return (type(value), value.hex())
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), *(_value(item) for item in value))
    return id(value)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What decides whether a module traces: where one failed, its like is not tried again.

    Coarser than :func:`_structure` (numbers do not count). To be wrong here costs a graph, never a
    weight: the children of a module without a graph are looked at one by one.
    """
    switches = (
        (n, v)
        for n, v in module.__dict__.items()
        if n not in _OWN and isinstance(v, bool | str | None)
    )
    children = tuple((name, type(child)) for name, child in module._modules.items())
    return (type(module), tuple(module._parameters), tuple(switches), children)


def _why_sealed(module: nn.Module) -> str | None:
    """Why nothing in a module can be looked at; None for most."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module: use the module that it was made from"
    if _is_uninitialized(module):
        return UNINITIALIZED
    if is_built_in(module) and _sealed(module):
        return f"torch.nn.{type(module).__name__} applies its weights inside one opaque call"
    return None


def _sealed(module: nn.Module) -> bool:
    """Whether a module of torch.nn uses its weights, and those of its children, by itself."""
    open_ones = (*_OPERATIONS, nn.Sequential, nn.Transformer)
    written = written_out(module) is not None
    return not (written or isinstance(module, open_ones) or _container(module))


def _container(module: nn.Module) -> bool:
    # A subclass that defines no forward is never called, whatever its class.
    return type(module).forward is nn.Module.forward


def _is_uninitialized(module: nn.Module) -> bool:
    """Whether the shapes of a lazy layer's own parameters are not known yet."""
    return any(is_lazy(p) for p in module._parameters.values())
