"""Capture by regions: a graph for every module whose ``forward`` can be traced.

A region is a module with its graph. A module without a graph keeps its own ``forward``, and its children are
traced in any case. In the worst case, each linear layer is a region with one operation. Modules without
matrices are skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lora_fx import torch_private
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
    GuardedCodeGen,
    is_built_in,
    is_lazy,
    is_matrix,
    kept_graph,
    uninstall,
    wrapped_forward,
    wraps_own_forward,
)
from lora_fx.passes.patterns import patterns

__all__ = ["Graphs", "find_regions"]

# Modules of torch.nn that are one linear operation, and get a graph.
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
    """Capture every module that can be captured.

    Args:
        model: The model, from :func:`share_copy`.

    Returns:
        The regions by FQN, parents before children. For every other module that holds a matrix, the
        reason why it has no graph, and its partial graph.
    """
    regions: dict[str, Region] = {}
    opaque: dict[str, str] = {}
    begun: dict[str, fx.Graph] = {}
    seen: set[nn.Module] = set()
    holders = _holders(model)
    graphs = Graphs()
    kept = {module: graph for module in model.modules() if (graph := kept_graph(module))}
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
    _pass_by_position(regions)
    return Capture(model, regions, "regions", opaque=opaque, begun=begun)


def _pass_by_position(regions: dict[str, Region]) -> None:
    """Let the guard of a decorated forward pass as many positional arguments on as its callers pass."""
    for fqn, region in regions.items():
        for node in region.graph.nodes:
            called = regions.get(join(fqn, str(node.target))) if node.op == "call_module" else None
            if called is None:
                continue
            forward, code = type(called.module).forward, torch_private.codegen_of(called.graph)
            if isinstance(code, GuardedCodeGen) and wrapped_forward(forward) is not forward:
                code.positional = max(code.positional, len(node.args))


class Graphs:
    """Traced graphs of modules. Modules that a trace cannot distinguish share a graph."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[fx.Graph, str]] = {}
        self._kinds: set[Any] = set()
        self._failed: dict[Any, Untraceable] = {}

    def of(self, module: nn.Module) -> tuple[fx.Graph, str]:
        """Return the graph of a module's forward, and the reason why it must not run (empty if it may).

        Raises:
            Untraceable: With the reason in words.
        """
        if "forward" in module.__dict__ and not wraps_own_forward(module):
            raise Untraceable("its forward was replaced on the instance")
        kind = _kind(module)
        # Computing the structure is slow. A known structure has a known kind, so look at the kind first.
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
                graph, doubt = trace(
                    module, fixed=False, check_none=False, forward=forward, conditions=more
                )
        except Untraceable as reason:
            self._failed[kind] = reason
            raise
        result = make_opaque(graph, module), doubt
        layer = self.as_layer(module) if _computes_with_its_weight(module, graph) else None
        if layer is not None:
            result = layer, "it computes with its weight before it applies it"
        # The trace has restored the module, so its structure is the same as before.
        self._known[_structure(module)] = result
        self._kinds.add(kind)
        return result

    def as_layer(self, module: nn.Module) -> fx.Graph | None:
        """Return the graph of the PyTorch layer that a module's class extends, or None.

        The graph shows the operation. The module's own forward runs, because it may do more. It reads the
        weight with its adapters applied.
        """
        for cls in type(module).__mro__:
            if cls in _OPERATIONS and _has_its_own_forward(module, cls):
                try:
                    return trace(module, check_none=False, forward=cls.forward)[0]
                except Untraceable:
                    return None
        return None


def _computes_with_its_weight(module: nn.Module, graph: fx.Graph) -> bool:
    """Return True for a subclass of a layer that changes its weight before it applies the weight."""
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
    """Return True if a module's forward is not that of ``cls``, but set by a subclass or on the instance."""
    return "forward" in module.__dict__ or type(module).forward is not cls.forward


def _holders(model: nn.Module) -> set[nn.Module]:
    """Return the modules with a parameter of two or more dimensions, their own or of a module below."""
    holders: set[nn.Module] = set()

    def holds(module: nn.Module) -> bool:
        own = any(map(is_matrix, module._parameters.values())) or _is_uninitialized(module)
        # A list, so that all children are visited.
        below = [holds(child) for child in module.children()]
        if own or any(below):
            holders.add(module)
            return True
        return False

    holds(model)
    return holders


_OWN = frozenset(nn.Module().__dict__)
_SIMPLE = (bool, int, float, str, type(None))
_COMMON = frozenset({bool, int, str, type(None)})


def _structure(module: nn.Module, seen: dict[int, int] | None = None) -> tuple[Any, ...]:
    """Return a key of everything that a trace can depend on. Modules with equal keys share their graph.

    An attribute that cannot be compared is represented by its id, so that only the same object is equal.
    Modules and tensors are numbered, so that the key shows which of them are the same object: a graph uses
    the first name of each.
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
        # A trace may use the shape of a parameter as a constant.
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
        # 0.0 == -0.0, but a division distinguishes them.
        return (type(value), value.hex())
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), *(_value(item) for item in value))
    return id(value)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Return a key of modules that probably all fail to trace if one fails, so that they are not tried again.

    The key is coarser than :func:`_structure`: numbers are left out. If the guess is wrong, a module has no
    graph. No weight is lost, because the children of such a module are traced separately.
    """
    switches = (
        (n, v)
        for n, v in module.__dict__.items()
        if n not in _OWN and isinstance(v, bool | str | None)
    )
    children = tuple((name, type(child)) for name, child in module._modules.items())
    return (type(module), tuple(module._parameters), tuple(switches), children)


def _why_sealed(module: nn.Module) -> str | None:
    """Return the reason why neither a module nor its children can be traced, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module: use the module that it was made from"
    if _is_uninitialized(module):
        return UNINITIALIZED
    if is_built_in(module) and _sealed(module):
        return f"torch.nn.{type(module).__name__} applies its weights inside one opaque call"
    return None


def _sealed(module: nn.Module) -> bool:
    """Return True if a module of torch.nn applies its weights, and its children's, in one opaque call."""
    open_ones = (*_OPERATIONS, nn.Sequential, nn.Transformer)
    written = written_out(module) is not None
    return not (written or isinstance(module, open_ones) or _container(module))


def _container(module: nn.Module) -> bool:
    # A module whose class defines no forward, such as nn.ModuleList, is never called.
    return type(module).forward is nn.Module.forward


def _is_uninitialized(module: nn.Module) -> bool:
    """Return True if a lazy layer has parameters whose shapes are not known yet."""
    return any(is_lazy(p) for p in module._parameters.values())
