"""Low-level work on ``fx`` graphs: what would be ``node.args[1]`` elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["arguments", "erase_dead", "erase_unread", "target_of"]


def target_of(node: fx.Node) -> Any:
    """What a node calls: a function, or for ``call_method`` the method of ``torch.Tensor``."""
    if node.op == "call_function":
        return node.target
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target), None)
    return None


def arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """A node's arguments by name.

    Args:
        node: A ``call_function`` or ``call_method`` node.
        names: The parameters in order, separated by spaces, each with ``=default`` if it has one
            (a Python literal).

    Returns:
        Every parameter's value; a missing one without a default is None.
    """
    result: dict[str, Any] = {}
    for index, declared in enumerate(names.split()):
        name, _, default = declared.partition("=")
        if index < len(node.args):
            result[name] = node.args[index]
        elif name in node.kwargs:
            result[name] = node.kwargs[name]
        else:
            result[name] = eval(default, {}) if default else None
    return result


def erase_unread(graph: fx.Graph, operand: fx.Node) -> None:
    """Takes out how an operand was made, node by node upwards, where nobody else reads it.

    Args:
        graph: It is edited.
        operand: What an operation has read that is gone.
    """
    while not operand.users:
        above = operand.all_input_nodes
        graph.erase_node(operand)
        if not above:
            break
        operand = above[0]


def erase_dead(graph: fx.Graph) -> None:
    """Takes out what nobody reads of a graph that may call modules.

    Args:
        graph: It is edited. Calls of modules stay.
    """
    graph.eliminate_dead_code(_stays)


def _stays(node: fx.Node) -> bool:
    # fx asks the module of a call what it does, and a graph by itself has none: such a call stays.
    return node.op == "call_module" or node.is_impure()
