"""Regions: modules whose ``forward`` is generated from an ``fx.Graph``, and which keep their class.

A region's class is a subclass of the module's own class that differs in ``forward`` alone. So
``isinstance``, attributes, hooks, ``state_dict`` names, wrapping policies that go by class and
``torch.compile`` see the module that they know. Equal graphs share one class: one code object, one
compilation. Instances survive ``copy.deepcopy`` and ``pickle``, which a class made at run time does
not do by itself.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn

from lora_fx._frozen import freeze, thaw
from lora_fx.errors import CaptureError
from lora_fx.passes._generated import generated
from lora_fx.passes._refusal import refusal
from lora_fx.passes._signature import FALLBACK, GuardedCodeGen
from lora_fx.types import META_KEY, Region
from lora_fx.watch import BASE, GRAPH, Hooked, disarm, entry, left_graph

__all__ = [
    "CONSTANT",
    "copy_graph",
    "graphs_of",
    "install",
    "is_built_in",
    "is_region",
    "kept_graph",
    "original_class",
    "regions_of",
    "uninstall",
]

CONSTANT = "_lora_fx_constant_"
"""Prefix of buffers that a graph needs and the model does not have."""

_GRAPH, _BASE = GRAPH, BASE
_FALLBACK = "_lora_fx_fallback"
_KEPT = "_lora_fx_kept"

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)
_COMPARABLE = (bool, int, float, str, tuple)


def is_region(module: nn.Module) -> bool:
    """Whether the module's forward is generated from a graph."""
    return _GRAPH in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, also where it is a region, or watched."""
    found: type[nn.Module] = type(module).__dict__.get(_BASE, type(module))
    return found


def is_built_in(module: nn.Module) -> bool:
    """Whether the module is a layer of PyTorch, also one whose weight is reparametrised."""
    cls: type = original_class(module)
    if cls.__module__ == "torch.nn.utils.parametrize":
        cls = cls.__mro__[1]
    return cls.__module__.startswith(("torch.nn.modules.", "torch.nn.utils.", "torch.ao.nn."))


def regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The regions of a model by FQN, parents first."""
    return ((name, module) for name, module in model.named_modules() if is_region(module))


def graphs_of(model: nn.Module) -> dict[str, fx.Graph]:
    """The graph of every region of a captured or rewritten model, by FQN (``""`` is the root)."""
    return {name: getattr(type(module), _GRAPH) for name, module in regions_of(model)}


def kept_graph(module: nn.Module) -> tuple[fx.Graph, bool] | None:
    """The graph that a module has instead of its forward for good, and whether that may stand in for it.

    None for any other module, and for one that was captured or rewritten.
    """
    cls: Any = type(module)
    return (getattr(cls, _GRAPH), getattr(cls, _FALLBACK)) if cls.__dict__.get(_KEPT) else None


def install(regions: Iterable[Region], *, kept: bool = False) -> None:
    """Turns the module of every region into one that runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
        kept: Whether the graph is what the module computes from now on, so that a capture takes it over:
            the module's own code does not know how its weights are stored.
    """
    known: dict[tuple[type[nn.Module], int, bool], type[nn.Module]] = {}
    for region in regions:
        base = original_class(region.module)
        key = (base, id(region.graph), region.fallback)
        if key not in known:
            known[key] = _region_class(base, region.graph, region.fallback, kept)
        object.__setattr__(region.module, "__class__", known[key])


def uninstall(module: nn.Module) -> None:
    """Gives a region its own class back, and any module that is watched."""
    disarm(module)
    if is_region(module):
        # Not by the module's own __setattr__, which may keep watch over this attribute, too.
        object.__setattr__(module, "__class__", original_class(module))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy to edit: same node names, same tags, same code generation."""
    result = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = result.node_copy(node, lambda n: mapping[n])
    # Shared: defaults are compared by identity.
    result.set_codegen(graph._codegen)
    return result


def _region_class(
    base: type[nn.Module], graph: fx.Graph, fallback: bool, kept: bool = False
) -> type[nn.Module]:
    code = graph.python_code(root_module="self")
    codegen = graph._codegen
    constants = codegen.constants() if isinstance(codegen, GuardedCodeGen) else {}
    namespace: dict[str, Any] = {**code.globals, **constants}
    tags = tuple((n.name, n.meta[META_KEY]) for n in graph.nodes if META_KEY in n.meta)
    key = (
        base,
        code.src,
        tuple(sorted((name, id(value)) for name, value in namespace.items())),
        tags,
        fallback,
        kept,
        getattr(codegen, "reads", None),
    )
    known = _classes.get(key)
    if known is not None:
        return known
    conditions = codegen.conditions() if isinstance(codegen, GuardedCodeGen) else []
    namespace[FALLBACK] = (
        entry("fallback", base.forward)
        if fallback
        else refusal(base, conditions, dict(namespace), quantised=kept)
    )
    forward = generated(code.src, namespace, base.__name__)
    original = base.forward
    forward.__doc__ = original.__doc__
    forward.__signature__ = inspect.signature(original)
    cls = type(
        base.__name__,
        (_Regional, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": forward,
            _GRAPH: graph,
            _BASE: base,
            _FALLBACK: fallback,
            _KEPT: kept,
        },
    )
    _classes[key] = cls
    return cls


class _Regional(Hooked):
    """What a region's class adds to the module's own class, besides ``forward``.

    It has no ``__slots__``: Python would see another layout and refuse to change the class.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the module's own class that it has a subclass: it may register them."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. If the graph was made for another value, it is the graph that goes."""
        cls: Any = type(self)
        reads = getattr(getattr(cls, _GRAPH)._codegen, "reads", ())
        goes = name in reads and _differs(self, name, value)
        if goes and not getattr(cls, _FALLBACK):
            inside = (
                "its quantised weight is known to that graph alone: set it before quantize()"
                if getattr(cls, _KEPT)
                else "its adapter is part of that graph: set it before rewrite()"
            )
            raise CaptureError(
                f"{name} of this {cls.__name__} was {getattr(self, name, 'not set')!r} when its forward "
                f"was captured, and {inside}"
            )
        super().__setattr__(name, value)
        if goes:
            self.__class__ = getattr(cls, _BASE)
            left_graph(cast(nn.Module, self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A region of the same class."""
        cls: Any = type(self)
        own = getattr(getattr(cls, _BASE), "__deepcopy__", None)
        if own is not None and not isinstance(self, fx.GraphModule):
            result = own(self, memo)
            result.__class__ = cls
            return result
        # Not cls.__new__, which makes a class for each fx.GraphModule.
        result = object.__new__(cls)
        memo[id(self)] = result
        result.__setstate__(copy.deepcopy(_state_of(self), memo))
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The module's own class by name, and the graph beside it."""
        cls: Any = type(self)
        base = getattr(cls, _BASE)
        graph = (freeze(getattr(cls, _GRAPH)), getattr(cls, _FALLBACK), getattr(cls, _KEPT))
        if (base.__reduce__, base.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):
            return _rebuild, (base, *graph), self.__getstate__()
        # It has a way of its own, as fx.GraphModule does.
        plain = object.__new__(base)
        plain.__dict__.update(self.__dict__)
        return _rebuild_over, (plain, *graph)


def _state_of(module: Any) -> Any:
    state = module.__getstate__()
    # A graph of PyTorch's own compiler over the module that this one was copied from.
    return (
        {k: v for k, v in state.items() if k != "_compiled_call_impl"}
        if isinstance(state, dict)
        else state
    )


def _differs(module: Any, name: str, value: Any) -> bool:
    """Whether the new value of an attribute would make another graph."""
    old = getattr(module, name, copy)
    for read_at_run_time in (nn.Module, torch.Tensor):
        if isinstance(old, read_at_run_time) and isinstance(value, read_at_run_time):
            return False
    if name == "training" or old is value:
        return False
    return not (type(old) is type(value) and isinstance(value, _COMPARABLE) and old == value)


def _rebuild(
    base: type[nn.Module], frozen: tuple[Any, ...], fallback: bool, kept: bool = False
) -> nn.Module:
    cls = _region_class(base, thaw(frozen), fallback, kept)
    return cls.__new__(cls)


def _rebuild_over(plain: Any, frozen: tuple[Any, ...], fallback: bool, kept: bool = False) -> Any:
    plain.__class__ = _region_class(type(plain), thaw(frozen), fallback, kept)
    return plain
