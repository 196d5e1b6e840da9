"""Low-level reading and editing of ``fx`` graphs: what would be ``node.args[1]`` elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.types import META_KEY, Role, Tag

__all__ = ["Branch", "arguments", "target_of"]


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


def _tail(base: fx.Node) -> fx.Node:
    """The sum of a base operation and the branches that it has already."""
    found: fx.Node | None = base
    while found is not None:
        tail = found
        found = next((one for one in tail.users if _adds(one) and one.args[0] is tail), None)
    return tail


def _adds(node: fx.Node) -> bool:
    tag = node.meta.get(META_KEY)
    return isinstance(tag, Tag) and tag.role is Role.ADD


class Branch:
    """Writes the nodes of one adapter's branch, right after the base operation, each one tagged.

    If other adapters have branches there already, it comes after those, and is added to their sum. What it
    computes with is the base operation's own output in any case.

    The factors are read where they are first used.
    """

    def __init__(
        self,
        graph: fx.Graph,
        base: fx.Node,
        tag: Callable[[Role], Tag],
        factors: tuple[str, str],
        *,
        cast: bool,
        dropout: float,
        training: str,
        items: dict[str, fx.Node] | None = None,
        transposed: bool = False,
    ) -> None:
        self._graph = graph
        self._base = base
        self._tag = tag
        self._dropout = dropout
        self._training = training
        self._tail = _tail(base)
        self._next = self._tail.next
        self.made: list[fx.Node] = []
        self._factors = dict(zip("ab", factors, strict=True))
        self._cast = cast
        self._transposed = transposed
        self._read: dict[str, fx.Node] = {}
        self._items = {} if items is None else items
        base.meta[META_KEY] = tag(Role.BASE)

    @property
    def a(self) -> fx.Node:
        """A, in the dtype in which the branch computes."""
        return self._factor("a")

    @property
    def b(self) -> fx.Node:
        """B, in the dtype in which the branch computes."""
        return self._factor("b")

    def item(self, letter: str, index: int) -> fx.Node:
        """One expert's matrix of a factor.

        All branches of a graph take it from one ``unbind``: the gradient of a selection is as large as
        what is selected from, and there would be one for each expert.
        """
        name = self._factors[letter]
        if name not in self._items:
            self._items[name] = self.call(Role.FACTOR, torch.unbind, self._factor(letter))
        return self.call(Role.FACTOR, operator.getitem, self._items[name], index)

    def dropped(self, x: fx.Node) -> fx.Node:
        """``x`` after dropout that follows the owner's mode; ``x`` itself where there is none."""
        if not self._dropout:
            return x
        training = self._make(Role.DROPOUT, "get_attr", self._training)
        return self._make(Role.DROPOUT, "call_function", F.dropout, x, self._dropout, training)

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A tagged ``call_function`` node."""
        return self._make(role, "call_function", target, *args, **kwargs)

    def finish(self, up: fx.Node, scale: float, padding: tuple[int, int] | None = None) -> fx.Node:
        """Scales the branch, adds it to the base operation, and puts the sum in its place.

        Args:
            up: The branch.
            scale: Its factor.
            padding: How many output features of the base operation come before and after it.
        """
        scaled = self._make(Role.SCALE, "call_function", operator.mul, up, scale)
        if padding is not None:
            scaled = self._make(Role.PAD, "call_function", F.pad, scaled, padding)
        total = self._make(Role.ADD, "call_function", operator.add, self._tail, scaled)
        mine = set(self.made)
        self._tail.replace_all_uses_with(total, delete_user_cb=lambda user: user not in mine)
        return total

    def _factor(self, letter: str) -> fx.Node:
        if letter not in self._read:
            factor = self._make(Role.FACTOR, "get_attr", self._factors[letter])
            if self._cast:
                # The factors are small: they follow the activation, never the other way round.
                factor = self._make(Role.CAST, "call_method", "type_as", factor, self._base)
            if self._transposed:
                factor = self.call(Role.FACTOR, torch.t, factor)
            self._read[letter] = factor
        return self._read[letter]

    def _make(self, role: Role, op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._next):
            node = self._graph.create_node(op, target, args, kwargs)
        node.meta[META_KEY] = self._tag(role)
        self.made.append(node)
        return node
