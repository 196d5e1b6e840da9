"""Graphs as picklable values.

``fx`` pickles a module by tracing it again, which loses the tags. Here a graph is the list of its
nodes: functions by where they are found, other nodes by name.
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import torch
from torch import fx

from lora_fx.ir.values import META_KEY, Tag

__all__ = ["freeze", "thaw"]


class _Ref(str):
    """A node in a pickled graph, by name."""


class _Target(tuple[str, ...]):
    """A function in a pickled graph, by where it is found."""


def freeze(graph: fx.Graph) -> tuple[Any, ...]:
    """A graph as picklable values: fx would trace its module again, which loses the tags."""
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


def thaw(frozen: tuple[Any, ...]) -> fx.Graph:
    """The graph that :func:`freeze` was given: same names, same tags."""
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
        found: Any = getattr(importlib.import_module(target.__module__), target.__name__, None)
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
