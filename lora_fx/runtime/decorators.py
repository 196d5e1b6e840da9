"""Decorators that ask whether a class has them, and what may take the place of what they decorate.

Layers of transformers checkpoint their activations in such a decorator of ``forward``. Only the outermost one
of a class does, so it compares itself with ``type(self).forward``. A class that is made at run time has
another ``forward``, and nothing would be checkpointed. So the decorator stays: the class has a copy of it
that knows itself as the class's, around the function that is new.
"""

from __future__ import annotations

import functools
from types import CellType, FunctionType
from typing import Any

__all__ = ["around", "inner_of"]


def inner_of(function: Any) -> Any:
    """What a function decorates, if it is a decorator that asks whether a class has it; else the function.

    Args:
        function: The function that a class has.
    """
    while (inner := _decorated(function)) is not None:
        function = inner
    return function


def around(function: Any, inner: Any) -> Any:
    """What a class has to have in the place of a function, so that ``inner`` runs where that did.

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
        for held in _held(old):
            cell.cell_contents = instead.get(id(held), held)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    made.__dict__["__wrapped__"] = below
    return made


def _decorated(function: Any) -> Any:
    """The function that a decorator holds, if the decorator holds itself as well."""
    if not isinstance(function, FunctionType):
        return None
    held = [one for cell in function.__closure__ or () for one in _held(cell)]
    inner = vars(function).get("__wrapped__")
    known = any(one is function for one in held) and any(one is inner for one in held)
    return inner if known and isinstance(inner, FunctionType) else None


def _held(cell: CellType) -> tuple[Any, ...]:
    """What a variable has, if it has a value by now."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
