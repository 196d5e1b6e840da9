"""Low-level helpers for ``fx`` graphs, such as arguments by name instead of ``node.args[1]``.

This module also has the loop of every pass that edits graphs one by one, and helpers for parameters of lazy
layers that have not run yet. Such parameters have no shape, and raise if code reads the shape.
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lora_fx import torch_private
from lora_fx.formats import quantization_of
from lora_fx.ir import Capture, Pass, PassResult, Region
from lora_fx.runtime import in_place

__all__ = [
    "UNINITIALIZED",
    "GraphPass",
    "arguments",
    "edit_graphs",
    "elements",
    "erase_dead",
    "erase_unread",
    "is_lazy",
    "is_matrix",
    "known_arguments",
    "may_write",
    "target_of",
    "unknown_arguments",
]


def target_of(node: fx.Node) -> Any:
    """Return the function that a node calls, or for ``call_method`` the method of ``torch.Tensor``."""
    if node.op == "call_function":
        return node.target
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target), None)
    return None


def arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """Return a node's arguments by name.

    Args:
        node: A ``call_function`` or ``call_method`` node.
        names: The parameters in order, separated by spaces, each with ``=default`` if it has one
            (a Python literal). ``input|self`` is one parameter with several names. The result uses the first
            name. Parameters after ``*`` are keyword-only.

    Returns:
        The value of every parameter. A missing parameter without a default is None.
    """
    result: dict[str, Any] = {}
    positional, keyword = _declared(names)
    for index, declared in enumerate([*positional, *keyword]):
        known, _, default = declared.partition("=")
        spellings = known.split("|")
        passed = [name for name in spellings if name in node.kwargs]
        if index < len(node.args) and index < len(positional):
            result[spellings[0]] = node.args[index]
        elif passed:
            result[spellings[0]] = node.kwargs[passed[0]]
        else:
            result[spellings[0]] = eval(default, {}) if default else None
    return result


def known_arguments(node: fx.Node, names: str) -> dict[str, Any] | None:
    """Return :func:`arguments`, or None if the node passes an argument that is not among the names.

    An unknown argument (``out=``) may change what the node computes.
    """
    return None if unknown_arguments(node, names) else arguments(node, names)


def unknown_arguments(node: fx.Node, names: str) -> list[str]:
    """Return the arguments of a node that are not among these parameters, by name or position (``#3``).

    Args:
        node: Same as for :func:`arguments`.
        names: Same as for :func:`arguments`. Unknown arguments that are None are ignored, because None is
            their default.
    """
    positional, keyword = _declared(names)
    declared = [parameter.partition("=")[0].split("|") for parameter in (*positional, *keyword)]
    known = {name for spellings in declared for name in spellings}
    extra = enumerate(node.args[len(positional) :], len(positional) + 1)
    return [
        *(f"#{position}" for position, value in extra if value is not None),
        *(name for name, value in node.kwargs.items() if name not in known and value is not None),
    ]


def _declared(names: str) -> tuple[list[str], list[str]]:
    positional, _, keyword = names.partition("*")
    return positional.split(), keyword.split()


def erase_unread(graph: fx.Graph, operand: fx.Node) -> None:
    """Erase a node without readers, and then each first input that has no other readers.

    Args:
        graph: The graph. It is edited.
        operand: Former operand of an operation that was erased.
    """
    while not operand.users:
        above = operand.all_input_nodes
        graph.erase_node(operand)
        if not above:
            break
        operand = above[0]


def erase_dead(graph: fx.Graph) -> None:
    """Erase nodes without readers from a graph that may call modules.

    Args:
        graph: The graph. It is edited. Calls of modules stay.
    """
    graph.eliminate_dead_code(_stays)


def _stays(node: fx.Node) -> bool:
    # fx would look up the module of a call, which a bare graph does not have. So such calls stay.
    return node.op == "call_module" or node.is_impure()


def edit_graphs(capture: Capture, edit: Callable[[Region], fx.Graph | None]) -> PassResult:
    """Edit each graph of a capture once, also if several regions share it. They share the result, too.

    Args:
        capture: The capture. It is not changed.
        edit: Returns an edited copy of a region's graph, or None if there is nothing to do.
    """
    known: dict[int, fx.Graph | None] = {}
    regions = dict(capture.regions)
    for fqn, region in regions.items():
        key = id(region.graph)
        if key not in known:
            known[key] = edit(region)
        if (graph := known[key]) is not None:
            regions[fqn] = region.with_graph(graph)
    return PassResult.of(capture, regions=regions)


class GraphPass(Pass):
    """Base class of passes that edit graphs one by one."""

    def __call__(self, capture: Capture) -> PassResult:
        """Edit each graph once."""
        return edit_graphs(capture, self.edited)

    @abc.abstractmethod
    def edited(self, region: Region) -> fx.Graph | None:
        """Return an edited copy of a region's graph, or None if there is nothing to do."""


UNINITIALIZED = "its weights are not initialized yet: run the model once, then rewrite it"


def is_lazy(parameter: Tensor | None) -> bool:
    """Return True if the shape of a parameter is not known yet.

    Unlike torch's function for this, it does not narrow the type of its argument.
    """
    # A fast path, because isinstance is slow for these classes of torch.
    return type(parameter) is not nn.Parameter and isinstance(
        parameter, UninitializedParameter | UninitializedBuffer
    )


def is_matrix(parameter: nn.Parameter | None) -> bool:
    """Return True if a parameter is known to have two or more dimensions."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() > 1


def elements(parameter: Tensor) -> int:
    """Return the number of elements (values, for a quantized weight), or 0 if it is not known yet."""
    if is_lazy(parameter):
        return 0
    stored = quantization_of(parameter)
    return parameter.numel() if stored is None else stored.numel


_KNOWN = ("torch", "_operator", "math", "builtins", "lora_fx")
_WRITING = {
    "setitem",
    *(name for name in dir(operator) if name[0] == "i" and f"__{name}__" in dir(operator)),
}


def may_write(node: fx.Node) -> bool:
    """Return True if a node may change one of its arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = target_of(node)
    if isinstance(target, torch_private.OpOverload):
        return bool(torch_private.schema_of(target).is_mutable)
    name = getattr(target, "__name__", "")
    # Functions of torch that write have a name with "_" at the end, or a flag. Any other function may write.
    known = (getattr(target, "__module__", None) or "torch").split(".")[0] in _KNOWN
    flags = any(value is True for value in (*node.args, *node.kwargs.values()))
    writes = name.rstrip("_") != name or "out" in node.kwargs or target is in_place
    return not known or not name or flags or writes or name in _WRITING
