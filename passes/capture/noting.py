"""Notes what the code of a whole model reads of its modules and their settings while ``torch.export`` runs it.

An export runs the code as it is, so that no rule sees its reads. Instead, each module of the copy, and each
plain object that one of them holds, has for that time a class whose attribute access takes notes. What
functions read of globals and of variables around them is read off their code. It all becomes one
:class:`~lora_fx.passes._reads.Read` of the kind ``tree``, which guards the graph.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from lora_fx.ops import Seen, class_of, differs
from lora_fx.passes._reads import ModuleRoot, ObjectRoot, Path, Read, frozen, is_constant

__all__ = ["Notes", "noted_globals"]

_OWN = frozenset((*nn.Module().__dict__, "training", "forward"))
_NEVER = (
    nn.Module,
    torch.Tensor,
    type,
    FunctionType,
    MethodType,
    ModuleType,
    torch.Generator,
)
_LIBRARIES = ("torch", "lora_fx", "numpy")
_MISSING = object()


class Notes:
    """What was read, by object."""

    def __init__(self, model: nn.Module) -> None:
        """Prepares.

        Args:
            model: A copy that nobody else uses.
        """
        self._model = model
        self._reads: dict[int, dict[str, Any]] = {}
        self._objects: dict[int, dict[str, Any]] = {}
        self._swapped: list[tuple[Any, type]] = []
        self._classes: dict[type, type] = {}

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Takes notes in between."""
        for module in self._model.modules():
            self._swap(module)
        try:
            yield
        finally:
            for value, cls in self._swapped:
                object.__setattr__(value, "__class__", cls)
            self._drop_written()
            self._swapped.clear()

    def _drop_written(self) -> None:
        """Forgets what the code itself has set since: the next call finds what this one has left."""
        for value, _ in self._swapped:
            reads = self._reads.get(id(value), {})
            for name in [n for n, old in reads.items() if differs(getattr(value, n, _MISSING), old)]:
                del reads[name]

    @property
    def read(self) -> Read:
        """What was read, as one guard."""
        return Read(Path(), "tree", self._seen(self._model, set()))

    def _seen(self, value: Any, done: set[int]) -> Seen:
        done.add(id(value))
        attributes, missing, below = [], [], []
        for name, found in self._reads.get(id(value), {}).items():
            if found is _MISSING:
                missing.append(name)
            else:
                attributes.append((name, found))
        held = self._objects.get(id(value), {})
        children = value._modules if isinstance(value, nn.Module) else {}
        for name, child in (*held.items(), *children.items()):
            if child is None:
                attributes.append((name, None))
            elif id(child) not in done:
                below.append((name, self._seen(child, done)))
        return Seen(class_of(value), tuple(attributes), tuple(missing), tuple(below))

    def _swap(self, value: Any) -> None:
        cls = type(value)
        try:
            if cls not in self._classes:
                self._classes[cls] = _noting(cls, self)
            object.__setattr__(value, "__class__", self._classes[cls])
        except TypeError:
            return  # its layout is fixed: an object of C, or one with slots
        self._swapped.append((value, cls))

    def note(self, owner: Any, name: str, value: Any) -> None:
        """Notes one read."""
        if name in _OWN or name.startswith("_lora_fx"):
            return
        if value is _MISSING:
            # PyTorch looks for many a private name that is hardly ever there.
            if not name.startswith("_"):
                self._reads.setdefault(id(owner), {}).setdefault(name, value)
        elif is_constant(value):
            self._reads.setdefault(id(owner), {}).setdefault(name, frozen(value))
        elif not isinstance(value, _NEVER) and hasattr(value, "__dict__") and not callable(value):
            known = self._objects.setdefault(id(owner), {})
            if name not in known:
                known[name] = value
                if not isinstance(value, _Noting):
                    self._swap(value)


class _Noting:
    """Attribute access that takes notes."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keeps from the class that it has a subclass: it may register them."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("__") and not isinstance(value, MethodType):
            notes: Notes = object.__getattribute__(self, "_lora_fx_notes")
            notes.note(self, name, value)
        return value


def _noting(cls: type, notes: Notes) -> type:
    """A class like another one, which takes notes."""
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_lora_fx_notes": notes,
        "_lora_fx_base": getattr(cls, "_lora_fx_base", cls),
    }
    hook = getattr(cls, "__getattr__", None)
    if hook is not None:

        def found(self: Any, name: str) -> Any:
            try:
                value = hook(self, name)
            except AttributeError:
                if not name.startswith("__"):
                    notes.note(self, name, _MISSING)
                raise
            if value is None:
                notes.note(self, name, value)
            return value

        members["__getattr__"] = found
    return type(cls.__name__, (_Noting, cls), members)


def noted_globals(model: nn.Module) -> Iterator[Read]:
    """Constants that the code of a model may read of globals and of variables around functions.

    What its functions name, and those that they name, is looked at, not what they execute: a guard too many
    costs a comparison.
    """
    pending: list[Any] = [class_of(module).forward for module in model.modules()]
    methods = {cls for module in model.modules() for cls in class_of(module).__mro__}
    done: set[CodeType] = set()
    reads: dict[Path, Read] = {}
    while pending:
        found = pending.pop()
        found = found.fget if isinstance(found, property) else found
        function = inspect.unwrap(getattr(found, "__func__", found))
        if not isinstance(function, FunctionType) or _of_library(function):
            continue
        if function.__code__ in done:
            continue
        done.add(function.__code__)
        for path, value in _named(function):
            if isinstance(value, FunctionType | MethodType):
                pending.append(value)
            elif is_constant(value) and path is not None:
                reads.setdefault(path, Read(path, "contents", frozen(value)))
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        pending.extend(
            value
            for cls in methods
            for name in names
            if (value := cls.__dict__.get(name)) is not None
        )
    yield from reads.values()


def _of_library(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _named(function: FunctionType) -> Iterator[tuple[Path | None, Any]]:
    module = function.__globals__.get("__name__", "")
    known = sys.modules.get(module)
    importable = known is not None and vars(known) is function.__globals__
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                root = ModuleRoot(module) if importable else None
                path = None if root is None else Path(root).attribute(name)
                yield path, function.__globals__[name]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the variable has no value yet
            path = Path(ObjectRoot(cell)).attribute("cell_contents")
            yield path, cell.cell_contents

