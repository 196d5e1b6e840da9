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
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from lora_fx.errors import CaptureError
from lora_fx.ir.frozen import freeze, thaw
from lora_fx.ir.values import META_KEY, Region
from lora_fx.passes.graph.generated import generated
from lora_fx.passes.graph.reads import Path, Read
from lora_fx.passes.graph.refusal import refusal
from lora_fx.passes.graph.signature import FALLBACK, GuardedCodeGen
from lora_fx.runtime.decorators import around, inner_of
from lora_fx.runtime.ops import differs
from lora_fx.runtime.watch import BASE, CODES, GRAPH, Hooked, disarm, entry

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
_FORMS = "_lora_fx_forms"
_FALLBACK = "_lora_fx_fallback"
_KEPT = "_lora_fx_kept"

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


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
    """The graphs of all regions of a captured or rewritten model, by key (``""`` is the root)."""
    return {
        Region(name, module, graph, form=form).key: graph
        for name, module in regions_of(model)
        for form, graph in getattr(type(module), _FORMS).items()
    }


def kept_graph(module: nn.Module) -> tuple[Mapping[str, fx.Graph], bool] | None:
    """The graphs that a module has instead of its forward for good, and whether that may stand in for them.

    By the form of the call. None for any other module, and for one that was captured or rewritten.
    """
    cls: Any = type(module)
    return (getattr(cls, _FORMS), getattr(cls, _FALLBACK)) if cls.__dict__.get(_KEPT) else None


def install(regions: Iterable[Region], *, kept: bool = False) -> None:
    """Turns the module of every region into one that runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
        kept: Whether the graph is what the module computes from now on, so that a capture takes it over:
            the module's own code does not know how its weights are stored.
    """
    known: dict[Any, type[nn.Module]] = {}
    modules: dict[nn.Module, list[Region]] = {}
    for region in regions:
        modules.setdefault(region.module, []).append(region)
    for module, forms in modules.items():
        base = original_class(module)
        fallback = all(region.fallback for region in forms)
        key = (base, *((region.form, id(region.graph)) for region in forms), fallback)
        if key not in known:
            graphs = {region.form: region.graph for region in forms}
            known[key] = _region_class(base, graphs, fallback, kept)
        object.__setattr__(module, "__class__", known[key])


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
    base: type[nn.Module], graphs: Mapping[str, fx.Graph], fallback: bool, kept: bool = False
) -> type[nn.Module]:
    """The class of a module that runs graphs: one for each form of a call, the first that applies."""
    forms = [_Form(graph) for graph in graphs.values()]
    key = (base, *(form.key for form in forms), *graphs, fallback, kept)
    known = _classes.get(key)
    if known is not None:
        return known
    forward: Any = entry("fallback", inner_of(base.forward))
    if not fallback:
        guards = [(form.conditions, form.reads, dict(form.namespace)) for form in forms]
        forward = refusal(base, guards, quantised=kept)
    original = base.forward
    codes: dict[types.CodeType, fx.Graph] = {}
    for form, graph in reversed([*zip(forms, graphs.values(), strict=True)]):
        # A call that a graph does not apply to goes on to the next one.
        form.namespace[FALLBACK] = forward
        forward = generated(form.source, form.namespace, base.__name__)
        forward.__doc__ = original.__doc__
        forward.__signature__ = inspect.signature(original)
        codes[forward.__code__] = graph
    forward = around(original, forward)
    cls = type(
        base.__name__,
        (_Regional, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": forward,
            _GRAPH: next(iter(graphs.values())),
            CODES: codes,
            _FORMS: types.MappingProxyType(dict(graphs)),
            _BASE: base,
            _FALLBACK: fallback,
            _KEPT: kept,
        },
    )
    _classes[key] = cls
    return cls


class _Form:
    """What a graph becomes in a class: source, globals, and what tells it from others."""

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code(root_module="self")
        codegen = graph._codegen
        guarded = isinstance(codegen, GuardedCodeGen)
        self.source = code.src
        self.namespace: dict[str, Any] = {
            **code.globals,
            **(codegen.constants() if isinstance(codegen, GuardedCodeGen) else {}),
        }
        self.conditions = codegen.conditions() if isinstance(codegen, GuardedCodeGen) else []
        self.reads = codegen.reads if isinstance(codegen, GuardedCodeGen) else ()
        tags = tuple((n.name, n.meta[META_KEY]) for n in graph.nodes if META_KEY in n.meta)
        names = tuple(sorted((name, id(value)) for name, value in self.namespace.items()))
        self.key = (code.src, names, tags, guarded)


class _Regional(Hooked):
    """What a region's class adds to the module's own class, besides ``forward``.

    It has no ``__slots__``: Python would see another layout and refuse to change the class.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the module's own class that it has a subclass: it may register them."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; refuses at once what the next call would refuse."""
        cls: Any = type(self)
        for read in () if getattr(cls, _FALLBACK) else _reads_of(cls, name):
            if read.kind in ("value", "contents") and differs(value, read.expected):
                inside = (
                    "its quantised weight is known to that graph alone: set it before quantize()"
                    if getattr(cls, _KEPT)
                    else "its adapter is part of that graph: set it before rewrite()"
                )
                raise CaptureError(
                    f"{name} of this {cls.__name__} was {read.expected!r} when its forward was captured, "
                    f"and {inside}"
                )
        super().__setattr__(name, value)

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
        frozen = {form: freeze(graph) for form, graph in getattr(cls, _FORMS).items()}
        graph = (frozen, getattr(cls, _FALLBACK), getattr(cls, _KEPT))
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


def _reads_of(cls: Any, name: str) -> Iterator[Read]:
    """What the graph of a region took for granted about an attribute."""
    path = Path().attribute(name)
    for graph in getattr(cls, _FORMS).values():
        yield from (one for one in getattr(graph._codegen, "reads", ()) if one.path == path)


def _rebuild(
    base: type[nn.Module], frozen: Mapping[str, Any], fallback: bool, kept: bool = False
) -> nn.Module:
    cls = _region_class(base, _thawed(frozen), fallback, kept)
    return cls.__new__(cls)


def _rebuild_over(plain: Any, frozen: Mapping[str, Any], fallback: bool, kept: bool = False) -> Any:
    plain.__class__ = _region_class(type(plain), _thawed(frozen), fallback, kept)
    return plain


def _thawed(frozen: Mapping[str, Any]) -> dict[str, fx.Graph]:
    return {form: thaw(graph) for form, graph in frozen.items()}
