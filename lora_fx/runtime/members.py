"""Members of a library's class that a rewritten model has in a way of its own.

A rewritten model is an instance of its own class, so that a trainer saves it by the methods of that class,
which know nothing of adapters. The class of a watched module has others in the place of those that are
registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["members_of", "register_member"]

_members: dict[str, Callable[[Any], Any]] = {}


def register_member(name: str, make: Callable[[Any], Any]) -> None:
    """Has modules that have a member of this name get another one when they are watched.

    Args:
        name: Its name.
        make: Is given what the class has, and returns what takes its place.
    """
    _members[name] = make


def members_of(cls: type) -> dict[str, Any]:
    """The members that take the place of those of a class."""
    return {name: make(getattr(cls, name)) for name, make in _members.items() if hasattr(cls, name)}
