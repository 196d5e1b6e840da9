"""Find what the code of a model reaches outside of it: globals, variables around functions, class attributes.

A copy of a model has copies of whatever its modules hold (``passes/graph/copies.py``). Its classes are
those of the original, and so is what their code names: a list that every layer is entered in goes on
holding those of the original. A call would use them, whose weights no merge has changed.
"""

from __future__ import annotations

import ast
import functools
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lora_fx.passes.graph import (
    ATOMS,
    children,
    named_by,
    original_class,
    stands_apart,
    storage_of,
    tree_of,
)

__all__ = ["named_elsewhere"]

# What makes a module is done: where it has entered itself does not matter unless something looks there.
_DONE = ("__init__", "__new__", "__init_subclass__")
# By name, since environments lie on top of each other.
_INSTALLED = {"site-packages", "dist-packages"}
_WEAK = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)
_WRAPPED: dict[type, tuple[str, ...]] = {
    property: ("fget", "fset"),
    classmethod: ("__func__",),
    staticmethod: ("__func__",),
    functools.cached_property: ("func",),
}


def named_elsewhere(model: nn.Module, storages: Mapping[int, str]) -> tuple[str, str] | None:
    """Where the code of a model leads to one of some tensors without going through the model.

    Code is followed by the names in it, whether or not they are executed: that of the methods of each class,
    of what the modules hold, and of the functions and classes that these name. Libraries are left out:
    Python's own, PyTorch and NumPy. Of other installed packages only the modules are looked at in which a
    class of the model is defined. Names that code makes up when it runs are not known.

    Args:
        model: A model. What is reached through its modules is not looked at.
        storages: The storages of the tensors, each with a name.

    Returns:
        In words how it gets there, and the name of the tensor; None if it does not.
    """
    own = set(map(id, model.modules())) | {id(tensor) for tensor in _tensors_of(model)}
    classes = dict.fromkeys(original_class(module) for module in model.modules())
    search = _Search(own, {above.__module__ for cls in classes for above in cls.__mro__})
    for cls in classes:
        search.add("", cls)
    for module in model.modules():
        for value in module.__dict__.values():
            if not isinstance(value, dict) or value:
                search.add("", value)
    return search.first(storages)


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Search:
    """Goes from values to those that they lead to, the nearest first.

    Attributes:
        own: Ids of what is not looked at.
        homes: Names of the Python modules in which classes of the model are defined.
    """

    def __init__(self, own: set[int], homes: set[str]) -> None:
        self.own, self.homes = own, homes
        self._seen: dict[int, Any] = {}  # held, so that ids stay theirs
        self._pending: deque[tuple[str, Any]] = deque()

    def add(self, path: str, value: Any) -> None:
        """Has a value looked at.

        Args:
            path: Where it is, in words.
            value: The value.
        """
        if isinstance(value, type | FunctionType):
            if not self._is_followed(value.__module__):
                return
        elif isinstance(value, ATOMS):
            return
        if id(value) not in self._seen and id(value) not in self.own:
            self._seen[id(value)] = value
            self._pending.append((path, value))

    def _is_followed(self, module: str | None) -> bool:
        """Whether the code of a Python module is looked at."""
        return not stands_apart(module) and (
            module in self.homes or not _is_installed(module or "")
        )

    def first(self, storages: Mapping[int, str]) -> tuple[str, str] | None:
        """The nearest tensor that is one of those, as :func:`named_elsewhere` gives it."""
        while self._pending:
            path, value = self._pending.popleft()
            if isinstance(value, torch.Tensor) and (name := storages.get(_storage(value))):
                return path, name
            for label, child in _leads(value):
                self.add(path + label, child)
        return None


def _leads(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what can be reached from a value, each with the way to it."""
    if isinstance(value, type):
        yield from _of_class(value)
    elif type(value) in _WRAPPED:
        for name in _WRAPPED[type(value)]:
            yield "", getattr(value, name)
    elif isinstance(value, _WEAK):
        for item in (*value, *value.values()) if hasattr(value, "values") else value:
            yield "[...]", item
    elif not isinstance(value, FunctionType) or not stands_apart(value.__module__):
        if isinstance(value, FunctionType):
            yield from _of_code(value)
        yield from children(value)
        yield "", type(value)


def _of_class(value: type) -> Iterator[tuple[str, Any]]:
    for cls in value.__mro__:
        if stands_apart(cls.__module__):
            continue
        left_out = ("__annotations__", *(_DONE if issubclass(cls, nn.Module) else ()))
        for name, item in vars(cls).items():
            if name not in left_out:
                yield f"{cls.__qualname__}.{name}", item


def _of_code(function: FunctionType) -> Iterator[tuple[str, Any]]:
    read = _names(function.__code__, function.__qualname__)
    for words, _, _, value in named_by(function):
        if read is None or words.partition(".")[0] in read:
            yield f" -> {words}", value


def _storage(tensor: torch.Tensor) -> int:
    try:
        return storage_of(tensor)
    except (RuntimeError, NotImplementedError):  # a stand-in has none
        return 0


@functools.lru_cache(maxsize=8192)
def _is_installed(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not _INSTALLED.isdisjoint(Path(file).parts)


@functools.lru_cache(maxsize=8192)
def _names(code: CodeType, qualname: str) -> frozenset[str] | None:
    """The names in code that are not those of attributes; None where there is no source to tell them by."""
    found = tree_of(code, qualname)
    if isinstance(found, str):
        return None
    return frozenset(one.id for one in ast.walk(found[0]) if isinstance(one, ast.Name))
