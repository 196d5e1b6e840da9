"""Random draws in an exported graph, given back to the module that makes them.

Export runs a model in training mode, so that a module that draws numbers then and only then (stochastic
depth) is in the graph as the operations of that mode, with nothing that tells when they apply. Where they
are the whole of a module without weights, from one tensor to one of its shape, a call of the module says
the same and follows its mode and its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

__all__ = ["call_owner"]


def call_owner(node: fx.Node, model: nn.Module, name: Callable[[fx.Node], str]) -> bool:
    """Puts a call of a module into the place of its operations. Edits the graph.

    Args:
        node: One of the operations, from ``torch.export``, with ``val``.
        model: The model that the module is in.
        name: Tells the module in whose forward a node was recorded.

    Returns:
        Whether that could be done: False leaves the graph as it was.
    """
    owner = name(node)
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    if not owner or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    required = [
        p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty
    ]
    inside = _call_of(node, lambda one: f"{name(one)}.".startswith(f"{owner}."))
    given = {i for n in inside for i in n.all_input_nodes if i not in inside and _tensor(i)}
    results = [n for n in inside if any(user not in inside for user in n.users)]
    if len(required) != 1 or len(given) != 1 or len(results) != 1:
        return False
    (x,), (result,) = given, results
    if _shape(x) != _shape(result):
        return False
    with node.graph.inserting_before(result):
        call = node.graph.call_module(owner, (x,))
    call.meta.update(result.meta)
    result.replace_all_uses_with(call)
    for one in reversed([n for n in node.graph.nodes if n in inside]):
        node.graph.erase_node(one)
    return True


def _call_of(node: fx.Node, owned: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The tensors that hang together with one: a module that is called twice has two such groups."""
    found, pending = {node}, [node]
    while pending:
        one = pending.pop()
        near = {n for n in (*one.all_input_nodes, *one.users) if n not in found}
        fresh = {n for n in near if n.op == "call_function" and owned(n) and _tensor(n)}
        found |= fresh
        pending.extend(fresh)
    return found


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: fx.Node) -> list[Any]:
    sizes = node.meta["val"].shape
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]
