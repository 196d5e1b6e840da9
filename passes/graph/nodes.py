"""Low-level work on ``fx`` graphs: what would be ``node.args[1]`` elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = [
    "arguments",
    "erase_dead",
    "erase_unread",
    "known_arguments",
    "target_of",
    "unknown_arguments",
]


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
            (a Python literal). ``input|self`` is one parameter with several names, the first of which
            counts here; what comes after ``*`` is passed by keyword only.

    Returns:
        Every parameter's value; a missing one without a default is None.
    """
    result: dict[str, Any] = {}
    positional, keyword = _declared(names)
    for index, declared in enumerate([*positional, *keyword]):
        known, _, default = declared.partition("=")
        several = known.split("|")
        passed = [name for name in several if name in node.kwargs]
        if index < len(node.args) and index < len(positional):
            result[several[0]] = node.args[index]
        elif passed:
            result[several[0]] = node.kwargs[passed[0]]
        else:
            result[several[0]] = eval(default, {}) if default else None
    return result


def known_arguments(node: fx.Node, names: str) -> dict[str, Any] | None:
    """What :func:`arguments` gives, or None where the node passes something that is not among the names.

    Whoever asks what a node computes may not pass over an argument that it does not know (``out=``).
    """
    return None if unknown_arguments(node, names) else arguments(node, names)


def unknown_arguments(node: fx.Node, names: str) -> list[str]:
    """What a node passes that is not among these parameters, by name or as ``#3`` by its place.

    Args:
        node: As for :func:`arguments`.
        names: Likewise. None is what an optional argument is by default, whatever its name.
    """
    positional, keyword = _declared(names)
    declared = [one.partition("=")[0].split("|") for one in (*positional, *keyword)]
    known = {name for several in declared for name in several}
    extra = enumerate(node.args[len(positional) :], len(positional) + 1)
    return [
        *(f"#{place}" for place, value in extra if value is not None),
        *(name for name, value in node.kwargs.items() if name not in known and value is not None),
    ]


def _declared(names: str) -> tuple[list[str], list[str]]:
    positional, _, keyword = names.partition("*")
    return positional.split(), keyword.split()


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
