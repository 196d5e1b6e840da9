"""Classes that are made at run time, for modules that exist already."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn

__all__ = ["subclass"]


def subclass(
    mixins: tuple[type, ...], cls: type[nn.Module], members: Mapping[str, Any]
) -> type[nn.Module]:
    """Make a subclass of a module's class that a module of that class can be given.

    Python compares the layouts of two classes along their first bases. Where ``nn.Module`` is not among
    those of a class (an ``abc.ABC`` stands before it), a mixin would come first in another way, so that what
    it defines is copied into the subclass instead.

    Args:
        mixins: What is added to the class, the most important first: modules without a state. They are in
            the bases of each other, from the first to the last.
        cls: The module's class.
        members: What the subclass defines itself.
    """
    first: type | None = cls
    while first not in (nn.Module, None):
        first = first.__base__
    if first is nn.Module:
        return type(cls.__name__, (mixins[0], cls), dict(members))
    made: type = cls
    for mixin in reversed(mixins):
        cell = CellType()
        copied = {
            name: _copied(value, cell)
            for name, value in vars(mixin).items()
            if name not in ("__dict__", "__weakref__", "__module__", "__qualname__")
        }
        made = type(cls.__name__, (made,), {**copied, **(members if mixin is mixins[0] else {})})
        cell.cell_contents = made
    return made


def _copied(value: Any, cell: CellType) -> Any:
    """A member for another class, whose ``super()`` begins there."""
    if isinstance(value, classmethod):
        return classmethod(_copied(value.__func__, cell))
    if not isinstance(value, FunctionType):
        return value
    cells = tuple(
        cell if name == "__class__" else held
        for name, held in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    )
    made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    made.__defaults__, made.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
    made.__doc__ = value.__doc__
    return made
