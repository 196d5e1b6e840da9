"""Regions: modules whose ``forward`` is generated from an ``fx.Graph``, and which keep their class.

A region's class is a subclass of the module's own class that differs in ``forward`` alone. So
``isinstance``, attributes, hooks, ``state_dict`` names, wrapping policies that go by class and
``torch.compile`` see the module that they know. Equal graphs share one class: one code object, one
compilation. Instances survive ``copy.deepcopy`` and ``pickle``, which a class made at run time does not
do by itself.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import linecache
import pickle
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import CaptureError
from lora_fx.passes._signature import FALLBACK
from lora_fx.types import META_KEY, Region, Tag

__all__ = [
    "CONSTANT",
    "copy_graph",
    "graphs_of",
    "install",
    "is_region",
    "original_class",
    "regions_of",
    "uninstall",
]

CONSTANT = "_lora_fx_constant_"
"""Prefix of buffers that a graph needs and the model does not have."""

_GRAPH = "_lora_fx_graph"
_BASE = "_lora_fx_base"
_FALLBACK = "_lora_fx_fallback"

_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)
_counter = itertools.count()


def is_region(module: nn.Module) -> bool:
    """Whether the module's forward is generated from a graph."""
    return _GRAPH in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, also where it is a region."""
    cls = type(module)
    return getattr(cls, _BASE) if is_region(module) else cls


def regions_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The regions of a model by FQN, parents first."""
    return ((name, module) for name, module in model.named_modules() if is_region(module))


def graphs_of(model: nn.Module) -> dict[str, fx.Graph]:
    """The graph of every region of a captured or rewritten model, by FQN (``""`` is the root)."""
    return {name: getattr(type(module), _GRAPH) for name, module in regions_of(model)}


def install(regions: Iterable[Region]) -> None:
    """Turns the module of every region into one that runs its graph.

    Args:
        regions: Modules and their graphs. A graph must not be edited afterwards.
    """
    known: dict[tuple[type[nn.Module], int, bool], type[nn.Module]] = {}
    for region in regions:
        base = original_class(region.module)
        key = (base, id(region.graph), region.fallback)
        if key not in known:
            known[key] = _region_class(base, region.graph, region.fallback)
        region.module.__class__ = known[key]


def uninstall(module: nn.Module) -> None:
    """Gives a region its own class back."""
    if is_region(module):
        module.__class__ = original_class(module)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy to edit: same node names, same tags, same code generation."""
    result = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = result.node_copy(node, lambda n: mapping[n])
    result.set_codegen(copy.deepcopy(graph._codegen))
    return result


def _region_class(base: type[nn.Module], graph: fx.Graph, fallback: bool) -> type[nn.Module]:
    code = graph.python_code(root_module="self")
    tags = tuple((n.name, n.meta[META_KEY]) for n in graph.nodes if META_KEY in n.meta)
    key = (
        base,
        code.src,
        tuple(sorted((name, id(value)) for name, value in code.globals.items())),
        tags,
        fallback,
    )
    known = _classes.get(key)
    if known is not None:
        return known
    namespace = dict(code.globals)
    namespace[FALLBACK] = base.forward if fallback else _refusal(base)
    forward = _compile(code.src, namespace, base)
    original = base.forward
    forward.__doc__ = original.__doc__
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    cls = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": forward,
            "__reduce_ex__": _reduce,
            "__deepcopy__": _deepcopy,
            _GRAPH: graph,
            _BASE: base,
            _FALLBACK: fallback,
        },
    )
    _classes[key] = cls
    return cls


def _compile(source: str, namespace: dict[str, Any], base: type[nn.Module]) -> Any:
    # Registered with linecache so that a traceback through generated code shows it.
    filename = f"<lora_fx {base.__name__} {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    forward = namespace["forward"]
    # The text lives as long as the code that it explains.
    weakref.finalize(forward, linecache.cache.pop, filename, None)
    return forward


def _refusal(base: type[nn.Module]) -> Any:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"{base.__name__}.forward was captured for other arguments than it is called with, and "
            "its own forward would leave its adapter out. Pass example_inputs that look like this "
            f"call to rewrite(). Called with {len(args)} positional argument(s) and keywords "
            f"{sorted(kwargs)}."
        )

    return refuse


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    result = type(self).__new__(type(self))
    memo[id(self)] = result
    result.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return result


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    cls = type(self)
    spec = (getattr(cls, _BASE), _freeze(getattr(cls, _GRAPH)), getattr(cls, _FALLBACK))
    return _rebuild, spec, self.__dict__


def _rebuild(base: type[nn.Module], frozen: tuple[Any, ...], fallback: bool) -> nn.Module:
    cls = _region_class(base, _thaw(frozen), fallback)
    return cls.__new__(cls)


class _Ref(str):
    """A node in a pickled graph, by name."""


class _Target(tuple[str, ...]):
    """A function in a pickled graph, by where it is found."""


def _freeze(graph: fx.Graph) -> tuple[Any, ...]:
    """A graph as picklable values: fx pickles a module by tracing it again, which loses the tags."""
    nodes = [
        (
            node.op,
            node.name,
            _freeze_target(node.target),
            _map(node.args, lambda n: _Ref(n.name)),
            _map(node.kwargs, lambda n: _Ref(n.name)),
            node.meta.get(META_KEY),
        )
        for node in graph.nodes
    ]
    return (nodes, graph._codegen)


def _thaw(frozen: tuple[Any, ...]) -> fx.Graph:
    nodes, codegen = frozen
    graph = fx.Graph()
    graph.set_codegen(codegen)
    named: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, tag in nodes:
        found = graph.create_node(
            op, _thaw_target(target), _unmap(args, named), _unmap(kwargs, named), name=name
        )
        named[name] = found
        if isinstance(tag, Tag):
            found.meta[META_KEY] = tag
    return graph


def _freeze_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return _Target(("op", namespace, name, target._overloadname))
    try:
        pickle.dumps(target)
    except Exception as error:
        found = getattr(importlib.import_module(target.__module__), target.__name__, None)
        if found is not target:
            raise pickle.PicklingError(f"cannot pickle a graph that calls {target!r}") from error
        return _Target(("function", target.__module__, target.__name__))
    return target


def _thaw_target(target: Any) -> Any:
    if not isinstance(target, _Target):
        return target
    kind, *path = target
    if kind == "function":
        return getattr(importlib.import_module(path[0]), path[1])
    return getattr(getattr(getattr(torch.ops, path[0]), path[1]), path[2])


def _map(value: Any, fn: Any) -> Any:
    # Not fx.map_arg: its containers are immutable subclasses that need torch to unpickle.
    if isinstance(value, fx.Node):
        return fn(value)
    if isinstance(value, dict):
        return {key: _map(item, fn) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_map(value.start, fn), _map(value.stop, fn), _map(value.step, fn))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, fn) for item in value))
    if isinstance(value, list | tuple):
        items = [_map(item, fn) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _unmap(value: Any, named: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return named[value]
    if isinstance(value, dict):
        return {key: _unmap(item, named) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_unmap(item, named) for item in (value.start, value.stop, value.step)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_unmap(item, named) for item in value))
    if isinstance(value, list | tuple):
        items = [_unmap(item, named) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
