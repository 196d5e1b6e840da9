"""Classes that are made at run time for modules that exist already, and what they take from the class below.

A library may make a subclass of such a class in turn, as FSDP2 does for every module that it shards. What it
adds stays when the class below it is exchanged.

A trainer saves a rewritten model by the methods of its own class, which know nothing of adapters: members of
ours (:data:`_MEMBERS`) take their place. Layers of transformers checkpoint their
activations in a decorator of ``forward`` that compares itself with ``type(self).forward``: a new class gets a
copy of it that knows itself as that class's (:func:`around`).
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
"""Attribute of a class that was made at run time: the module's own class."""

OVER = "_lora_fx_over"
"""Attribute of another library's subclass: the module's own class, which it is made of again."""


class Blank:
    """What a module without its state is made of: its class where it is copied, more where it is pickled.

    Attributes:
        cls: Its class, which was made at run time and has no name.
        made_of: Gives the function, and its arguments, that make such a module in another process.
    """

    def __init__(self, cls: type, made_of: Callable[[], tuple[Any, ...]]) -> None:
        self.cls, self.made_of = cls, made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Blank:
        """Itself: a copy of a module has the same class."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module that it stands for."""
        return self.made_of()


def blank(made: Any) -> Any:
    """A module without its state: what ``__reduce_ex__`` of a class that was made at run time names.

    Args:
        made: A :class:`Blank`, or the module that it was pickled as.
    """
    # Not cls.__new__, which makes a class for each fx.GraphModule.
    return object.__new__(made.cls) if isinstance(made, Blank) else made


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
    """Give a module another class in place of :func:`inner_class`."""
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
    return _outer.setdefault((outer, new), _new_class(outer, bases, members))


def _new_class(like: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """Make a class without telling the metaclass of the user's, which may keep a register of its classes."""
    meta = type(like)
    known: Any = next(one for one in type.mro(meta) if one.__module__ in ("builtins", "abc"))
    made: type = known.__new__(meta, like.__name__, bases, members)
    return made


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
        return _new_class(cls, (mixins[0], cls), dict(members))
    made: type = cls
    for mixin in reversed(mixins):
        cell = CellType()
        copied = {
            name: _copied(value, cell)
            for name, value in vars(mixin).items()
            if name not in ("__dict__", "__weakref__", "__module__", "__qualname__")
        }
        own = members if mixin is mixins[0] else {}
        made = _new_class(cls, (made,), {**copied, **own})
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


_MEMBERS = {
    "add_model_tags": "lora_fx.checkpoint.trainers:warns_of_reference",
    "save_pretrained": "lora_fx.checkpoint.trainers:saves_adapter",
    "_keys_to_ignore_on_save": "lora_fx.checkpoint.trainers:ignores_base",
}
"""What makes the member that takes the place of one of this name: it is given what the class has.

It is imported when a class with such a member is watched: then it is there, too, where a process has loaded a
pickled model and nothing else of lora-fx.
"""


def members_of(cls: type) -> dict[str, Any]:
    """The members that take the place of those of a class."""
    return {
        name: pkgutil.resolve_name(maker)(getattr(cls, name))
        for name, maker in _MEMBERS.items()
        if hasattr(cls, name)
    }


def inner_of(function: Any) -> Any:
    """What a function decorates, if it is a decorator that asks whether a class has it; else the function.

    Args:
        function: The function that a class has.
    """
    while (inner := _decorated(function)) is not None:
        function = inner
    return function


def around(function: Any, inner: Any) -> Any:
    """What a class has to have in place of a function, so that ``inner`` runs where that did.

    Args:
        function: The function that a class has.
        inner: What takes the place of :func:`inner_of` it.

    Returns:
        ``inner``, within copies of the decorators that :func:`inner_of` goes through.
    """
    decorated = _decorated(function)
    if decorated is None:
        return inner
    below = around(decorated, inner)
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(CellType() for _ in function.__closure__),
    )
    instead = {id(function): made, id(decorated): below}
    for cell, old in zip(made.__closure__ or (), function.__closure__, strict=True):
        for held in held_in(old):
            cell.cell_contents = instead.get(id(held), held)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    made.__dict__["__wrapped__"] = below
    return made


def _decorated(function: Any) -> Any:
    """The function that a decorator holds, if the decorator holds itself as well."""
    if not isinstance(function, FunctionType):
        return None
    held = [one for cell in function.__closure__ or () for one in held_in(cell)]
    inner = vars(function).get("__wrapped__")
    known = any(one is function for one in held) and any(one is inner for one in held)
    return inner if known and isinstance(inner, FunctionType) else None


def held_in(cell: CellType) -> tuple[Any, ...]:
    """What a variable around a function has; nothing as long as it has no value."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
