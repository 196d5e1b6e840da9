"""Classes that are created at run time for existing modules.

Another library may subclass such a class in turn, as FSDP2 does for every module that it shards. When
lora-fx replaces its own class, it creates the library's subclass again on top of the new class.

A trainer saves a rewritten model with methods of the model's class, which do not know adapters. lora-fx
replaces these methods (:data:`_MEMBERS`). Layers of transformers checkpoint their activations in a decorator
of ``forward`` that compares itself with ``type(self).forward``. A new class therefore gets a copy of the
decorator that refers to itself (:func:`around`).
"""

from __future__ import annotations

import functools
import pkgutil
import weakref
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn

__all__ = [
    "BASE",
    "OVER",
    "Blank",
    "around",
    "blank",
    "give_class",
    "held_in",
    "inner_class",
    "inner_of",
    "members_of",
    "subclass",
]

BASE = "_lora_fx_base"
"""Attribute of a class that was created at run time: the module's original class."""

OVER = "_lora_fx_over"
"""Attribute of a library's subclass that lora-fx has created again: the module's original class, below it."""


class Blank:
    """A stand-in for a module without its state, from which a copy or an unpickled module is created.

    Attributes:
        cls: The module's class, which was created at run time and cannot be imported.
        made_of: Returns a function and its arguments. Calling it creates such a module in another process.
    """

    def __init__(self, cls: type, made_of: Callable[[], tuple[Any, ...]]) -> None:
        self.cls, self.made_of = cls, made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Blank:
        """Return itself, because a copy of a module has the same class."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a call that creates the module in another process."""
        return self.made_of()


def blank(origin: Any) -> Any:
    """Return a module without its state. ``__reduce_ex__`` of classes created at run time refers to it.

    Args:
        origin: A :class:`Blank`, or the module that was created when the Blank was unpickled.
    """
    # cls.__new__ is not called, because that of fx.GraphModule creates another class.
    return object.__new__(origin.cls) if isinstance(origin, Blank) else origin


_outer: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()


def inner_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that lora-fx created for a module, or the original class if there is none.

    Subclasses that other libraries have added on top are skipped.
    """
    inner: type[nn.Module] = type(module)
    for cls in inner.__mro__:
        if BASE in cls.__dict__:
            inner = cls
            break
        if OVER in cls.__dict__:
            inner = cls.__dict__[OVER]
            break
    return inner


def give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Replace the :func:`inner_class` of a module. Subclasses of other libraries stay on top of it."""
    outer = _made_over(type(module), inner_class(module), cls)
    # The module's own __setattr__ may intercept ``__class__``.
    object.__setattr__(module, "__class__", outer)


def _made_over(outer: type, old: type, new: type) -> type:
    """Return a class like ``outer``, with ``new`` instead of ``old`` among its ancestors."""
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
    return _outer.setdefault((outer, new), _new_class(outer, bases, members))


def _new_class(like: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """Create a class without running the user's metaclass, which may register its classes."""
    meta = type(like)
    known: Any = next(base for base in type.mro(meta) if base.__module__ in ("builtins", "abc"))
    cls: type = known.__new__(meta, like.__name__, bases, members)
    return cls


def subclass(
    mixins: tuple[type, ...], cls: type[nn.Module], members: Mapping[str, Any]
) -> type[nn.Module]:
    """Create a subclass of a module's class that can be assigned to the module's ``__class__``.

    Python then compares the layouts of both classes along their first bases. If ``nn.Module`` is not among
    these, because an ``abc.ABC`` comes before it, a mixin as a base would change the layout. The members
    of the mixins are copied into the subclass instead.

    Args:
        mixins: Stateless module classes to add, the most derived first. Each is a subclass of the next.
        cls: The module's class.
        members: Members that the subclass itself defines.
    """
    first: type | None = cls
    while first not in (nn.Module, None):
        first = first.__base__
    if first is nn.Module:
        return _new_class(cls, (mixins[0], cls), dict(members))
    result: type = cls
    for mixin in reversed(mixins):
        cell = CellType()
        copied = {
            name: _copied(value, cell)
            for name, value in vars(mixin).items()
            if name not in ("__dict__", "__weakref__", "__module__", "__qualname__")
        }
        own = members if mixin is mixins[0] else {}
        result = _new_class(cls, (result,), {**copied, **own})
        cell.cell_contents = result
    return result


def _copied(value: Any, cell: CellType) -> Any:
    """Copy a member for another class, so that ``super()`` in it starts at that class."""
    if isinstance(value, classmethod):
        return classmethod(_copied(value.__func__, cell))
    if not isinstance(value, FunctionType):
        return value
    cells = tuple(
        cell if name == "__class__" else contents
        for name, contents in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    )
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    copy.__defaults__, copy.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
    copy.__doc__ = value.__doc__
    return copy


_MEMBERS = {
    "add_model_tags": "lora_fx.checkpoint.trainers:warns_of_reference",
    "save_pretrained": "lora_fx.checkpoint.trainers:saves_adapter",
    "_keys_to_ignore_on_save": "lora_fx.checkpoint.trainers:ignores_base",
}
"""Members of model classes that lora-fx replaces, with the function that creates each replacement.

The function takes the original member. It is imported when a class with that member is watched, so that it is
available even in a process that has unpickled a model and imported nothing else of lora-fx.
"""


def members_of(cls: type) -> dict[str, Any]:
    """Return the replacements for those members of a class that :data:`_MEMBERS` lists."""
    return {
        name: pkgutil.resolve_name(maker)(getattr(cls, name))
        for name, maker in _MEMBERS.items()
        if hasattr(cls, name)
    }


def inner_of(function: Any) -> Any:
    """Return the function inside of decorators whose closure has both the wrapper and the wrapped function.

    Any other function is returned as it is.

    Args:
        function: A member of a class.
    """
    while (inner := _decorated(function)) is not None:
        function = inner
    return function


def around(function: Any, inner: Any) -> Any:
    """Copy the decorators of a function, with another function inside.

    Args:
        function: A member of a class.
        inner: The function that replaces ``inner_of(function)``.

    Returns:
        ``inner``, inside of copies of the decorators that :func:`inner_of` goes through.
    """
    decorated = _decorated(function)
    if decorated is None:
        return inner
    below = around(decorated, inner)
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(CellType() for _ in function.__closure__),
    )
    instead = {id(function): copy, id(decorated): below}
    for cell, old in zip(copy.__closure__ or (), function.__closure__, strict=True):
        for value in held_in(old):
            cell.cell_contents = instead.get(id(value), value)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    copy.__dict__["__wrapped__"] = below
    return copy


def _decorated(function: Any) -> Any:
    """Return the function that a decorator wraps, if the decorator refers to itself in its closure."""
    if not isinstance(function, FunctionType):
        return None
    contents = [value for cell in function.__closure__ or () for value in held_in(cell)]
    inner = vars(function).get("__wrapped__")
    known = any(value is function for value in contents) and any(
        value is inner for value in contents
    )
    return inner if known and isinstance(inner, FunctionType) else None


def held_in(cell: CellType) -> tuple[Any, ...]:
    """Return the contents of a closure cell as a tuple, which is empty if the cell has no value yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
