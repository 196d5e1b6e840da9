"""Classes that are made at run time, for modules that exist already.

A library may make a subclass of such a class in turn, as FSDP2 does for every module that it shards. What it
adds stays when the class below it is exchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn

__all__ = ["BASE", "OVER", "give_class", "inner_class", "subclass"]

BASE = "_lora_fx_base"
"""Attribute of a class that was made at run time: the module's own class."""

OVER = "_lora_fx_over"
"""Attribute of another library's subclass: the module's own class, which it is made of again."""

_outer: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()


def inner_class(module: nn.Module) -> type[nn.Module]:
    """The class that was made for a module, or its own, without what another library has made of it since."""
    found: type[nn.Module] = type(module)
    for cls in found.__mro__:
        if BASE in cls.__dict__:
            found = cls
            break
        if OVER in cls.__dict__:
            found = cls.__dict__[OVER]
            break
    return found


def give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class in the place of :func:`inner_class`."""
    made = _made_over(type(module), inner_class(module), cls)
    # Not by the module's own __setattr__, which may keep watch over this attribute, too.
    object.__setattr__(module, "__class__", made)


def _made_over(outer: type, old: type, new: type) -> type:
    if outer is old:
        return new
    known = _outer.get((outer, new))
    if known is not None:
        return known
    bases = tuple(
        _made_over(base, old, new) if issubclass(base, old) else base for base in outer.__bases__
    )
    left_out = ("__dict__", "__weakref__", OVER)
    members = {name: value for name, value in vars(outer).items() if name not in left_out}
    if BASE not in new.__dict__:
        members[OVER] = new
    return _outer.setdefault((outer, new), type(outer)(outer.__name__, bases, members))


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
