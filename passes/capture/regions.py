"""Walks the module tree and gives a graph to every module whose ``forward`` traces.

A module without a graph keeps its own ``forward``, and its children are looked at one by one: in
the worst case each linear layer is a region of one operation. Modules over no matrix are left
alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from lora_fx.formats import quantization_of
from lora_fx.ir import Capture, Region, join
from lora_fx.passes.capture.decompositions import (
    make_opaque,
    setup_of,
    written_conditions,
    written_out,
)
from lora_fx.passes.capture.symbolic import Untraceable, trace
from lora_fx.passes.graph import (
    LIBRARIES,
    UNINITIALIZED,
    Parameter,
    classes_told,
    is_built_in,
    is_lazy,
    is_matrix,
    kept_graph,
    named_by,
    nested,
    parameters_of,
    uninstall,
    wraps_own_forward,
)
from lora_fx.runtime import held_in, ops

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

    def add(module: nn.Module, fqn: str, forms: Mapping[str, fx.Graph], own: bool) -> None:
        written = written_out(module) is not None
        for form, graph in forms.items():
            region = Region(fqn, module, graph, own, form, written_out=written)
            regions[region.key] = region

    def visit(module: nn.Module, fqn: str) -> None:
        if module in seen or module not in holders:
            return
        seen.add(module)
        sealed = None if module in kept else _why_sealed(module)
        if sealed is not None:
            opaque[fqn] = sealed
            return
        if module in kept:
            add(module, fqn, *kept[module])
        elif not _container(module):
            try:
                # The forward of what is written out reads its children's weights, or calls what does.
                own = written_out(module) is None or bool(written_conditions(module))
                add(module, fqn, graphs.of(module), own)
            except Untraceable as reason:
                opaque[fqn] = str(reason)
                if reason.begun is not None:
                    begun[fqn] = reason.begun
        for name, child in module.named_children():
            visit(child, join(fqn, name))

    visit(model, "")
    _take_off_told(regions, opaque, model)
    return Capture(model, regions, "regions", opaque=opaque, begun=begun)


def _take_off_told(regions: dict[str, Region], opaque: dict[str, str], model: nn.Module) -> None:
    """Takes off the graphs of modules that must keep their class, and says why."""
    # A module without a graph runs its own code, which may tell further ones.
    while told := _told_by_class(model, regions, opaque):
        for key, reason in told.items():
            opaque[regions.pop(key).fqn] = reason
    # One with a graph runs its own code for calls that the graph was not made for.
    own: dict[str, Any] = {key: type(region.module) for key, region in regions.items()}
    tellers = {key: asked for key, cls in own.items() if (asked := _classes_told(cls))}
    if not tellers:
        return
    others = {None, *(cls for region in regions.values() for cls in _classes_above(model, region))}
    for key, classes in tellers.items():
        if any(cls in others for cls, _ in classes):
            regions[key] = dataclasses.replace(regions[key], fallback=False)


def _classes_above(model: nn.Module, region: Region) -> list[type]:
    """The classes of the module of a region and of those that it is in: an adapter changes them all."""
    path = itertools.accumulate(region.fqn.split("."), join, initial="")
    return [type(model.get_submodule(one)) for one in path]


def _told_by_class(
    model: nn.Module, regions: Mapping[str, Region], opaque: Mapping[str, str]
) -> dict[str, str]:
    """Regions that cannot be: code that runs as it is tells their modules apart by their class.

    A module with a graph is of a class of its own, below that of the user.

    Returns:
        By key of the region, the reason.
    """
    asked: dict[type | None, str] = {}
    for fqn in opaque:
        cls: Any = type(model.get_submodule(fqn))
        asked.update(_classes_told(cls))
    if not asked:
        return {}
    told: dict[str, str] = {}
    for key, region in regions.items():
        classes = (None, *_classes_above(model, region))
        asker = next((asked[one] for one in classes if one in asked), None)
        if asker is not None:
            told[key] = (
                f"{asker} tells it from others by its class, or a module that it is in, and with an adapter "
                "they have another: use isinstance() there"
            )
    return told


@functools.lru_cache(maxsize=1024)
def _classes_told(cls: Any) -> tuple[tuple[type | None, str], ...]:
    """The classes that the forward of a class, and what that calls, compares with; each with who does."""
    pending: list[tuple[Any, bool]] = [(getattr(cls, "forward", None), True)]
    done: set[FunctionType] = set()
    found: dict[type | None, str] = {}
    while pending:
        one, is_method = pending.pop()
        function = inspect.unwrap(one) if isinstance(one, FunctionType) else None
        if not isinstance(function, FunctionType) or function in done:
            continue
        done.add(function)
        if (function.__module__ or "").partition(".")[0] in LIBRARIES:
            continue
        for told in classes_told(function):
            # Functions that are no methods take tensors and settings more often than modules.
            if told is not None or is_method:
                found.setdefault(told, function.__qualname__)
        names = {name for code in nested(function.__code__) for name in code.co_names}
        around = [value for cell in function.__closure__ or () for value in held_in(cell)]
        named = [*(function.__defaults__ or ()), *(value for *_, value in named_by(function))]
        pending += [(ops.function_of(value), is_method) for value in around]
        pending += [(ops.function_of(value), False) for value in named]
        # What super() gets to is a method, too.
        members = [vars(one).get(name) for one in cls.__mro__ for name in names]
        pending += [(ops.function_of(value), True) for value in members]
    return tuple(found.items())


class Graphs:
    """Traces modules; those that agree in all that a trace depends on get the same graph."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, fx.Graph]] = {}
        self._kinds: set[Any] = set()
        self._failed: dict[Any, Untraceable] = {}

    def of(self, module: nn.Module) -> dict[str, fx.Graph]:
        """The module's graphs by form (:attr:`lora_fx.ir.graph.Region.form`).

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
        try:
            forward = written_out(module)
            if forward is None:
                found = {"": trace(module, check_none=not is_built_in(module))}
                if not is_built_in(module):
                    found.update(_other_forms(module, found[""]))
            else:
                more = written_conditions(module)
                found = {"": trace(module, {}, check_none=False, forward=forward, conditions=more)}
        except Untraceable as reason:
            self._failed[kind] = reason
            raise
        made = {form: make_opaque(graph, module) for form, graph in found.items()}
        # A trace leaves the module as it was.
        self._known[_structure(module)] = made
        self._kinds.add(kind)
        return made


def _other_forms(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, fx.Graph]]:
    """Graphs of calls that give optional arguments, for a module whose code reads weights itself.

    The graph alone then has the branches of adapters, and the module's own forward cannot stand in.
    """
    region = Region("", module, graph)
    if not any(is_matrix(region.parameter(node)) for node in graph.nodes):
        return
    given = [p for p in parameters_of(type(module).forward) if not p.variadic and not p.traced]
    others = {p.name: _alternatives(p) for p in given}
    optional = [p for p in given if others[p.name]]
    most = len(optional) if len(optional) <= _MOST_OPTIONAL else 1
    for count in range(1, most + 1):
        for several in itertools.combinations(optional, count):
            for values in itertools.product(*(others[p.name] for p in several)):
                chosen = {p.name: value for p, value in zip(several, values, strict=True)}
                named = ", ".join(n if v is _GIVEN else f"{n}={v}" for n, v in chosen.items())
                fixed = {p.name: chosen.get(p.name, p.value) for p in given}
                try:
                    yield named, trace(module, {n: v for n, v in fixed.items() if v is not _GIVEN})
                except Untraceable:
                    continue  # such a call is refused where an adapter would be left out


def _alternatives(p: Parameter) -> tuple[Any, ...]:
    """What else callers give for an optional argument: something for nothing, the other truth or none."""
    if p.value is None:
        return (_GIVEN,)
    return (not p.value, None) if isinstance(p.value, bool) else ()


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


_GIVEN = object()
_MOST_OPTIONAL = 3  # of which all combinations are traced
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
