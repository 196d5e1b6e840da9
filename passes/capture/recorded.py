"""Classes that modules have during a trace, to record the attributes that code reads."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lora_fx.passes.graph import (
    ChildrenRead,
    MethodRead,
    ObjectRead,
    PresenceRead,
    ValueRead,
    children_of,
    is_constant,
)
from lora_fx.runtime.modules import subclass

if TYPE_CHECKING:
    from lora_fx.passes.capture.trace import Recorder

__all__ = ["is_used_up", "recording"]

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_PACKAGES = ("torch", "lora_fx")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type, functools.partial)
_METHODS = (types.MethodType, types.FunctionType)
_GENERATORS = (random.Random, torch.Generator)
_give_class = object.__dict__["__class__"].__set__  # not the property that _Recorded defines
_recorders: weakref.WeakKeyDictionary[nn.Module, Recorder] = weakref.WeakKeyDictionary()
_classes: weakref.WeakKeyDictionary[type, type[nn.Module]] = weakref.WeakKeyDictionary()


def is_used_up(value: Any) -> bool:
    """Return True for an iterator or a random generator, whose state advances with each use."""
    numpy = type(value).__module__.startswith("numpy.random")
    return numpy or isinstance(value, _GENERATORS) or hasattr(value, "__next__")


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Make a recorder note the attributes that code reads from its modules."""
    before = [(module, type(module)) for module in recorder.names]
    try:
        for module, cls in before:
            if not isinstance(module, torch.jit.ScriptModule):
                _recorders[module] = recorder
                _give_class(module, _recorded(cls))
        yield
    finally:
        for module, cls in before:
            if _recorders.pop(module, None) is not None:
                _give_class(module, cls)


def _recorded(cls: type[nn.Module]) -> type[nn.Module]:
    known = _classes.get(cls)
    if known is None:
        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        known = _classes.setdefault(cls, subclass((_Recorded,), cls, members))
    return known


class _Recorded(nn.Module):
    """Mixin of the class that a module has during a trace."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Hide the subclass from the module's own class, which may register its subclasses."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Return the module's own class, for code that reads ``__class__``."""
        return type(self).__mro__[_place_of_own(type(self))]  # type: ignore[arg-type]

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, and note the read."""
        value = super().__getattribute__(name)
        if name in _OF_MODULES or name.startswith("__"):
            return _internal(self, name, value)
        if isinstance(value, _METHODS) and name not in object.__getattribute__(self, "__dict__"):
            recorder = _recorders.get(self)
            if recorder is not None:
                _note_method(recorder, self, name, value)
            return value
        return _noted(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, a buffer or a module, and note the read."""
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_") and (recorder := _recorders.get(self)) is not None:
                recorder.doubts(f"its forward looks whether there is {_path(self, name)}")
            raise
        return _noted(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and note that the graph must not run, because it would not set the attribute."""
        _recorders[self].doubts(
            f"its forward writes to {_path(self, name)}, an attribute of a module"
        )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, and note that the graph must not run, because it would not delete it."""
        _recorders[self].doubts(
            f"its forward deletes {_path(self, name)}, an attribute of a module"
        )
        super().__delattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a call of a child module as one node."""
        return _recorders[self].call_child(self, args, kwargs)


@functools.lru_cache(maxsize=1024)
def _place_of_own(cls: type) -> int:
    mro = cls.__mro__
    return next(index for index, base in enumerate(mro) if index and base is not _Recorded)


def _path(module: nn.Module, name: str) -> str:
    above = _recorders[module].names[module]
    return f"{above}.{name}" if above else name


def _internal(module: nn.Module, name: str, value: Any) -> Any:
    """Return an internal attribute of a module, and note reads of its dicts, such as ``_modules``."""
    caller = str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0]
    recorder = _recorders.get(module)
    if recorder is None:
        return value
    if name == "_modules" and caller in _PACKAGES:
        recorder.read(ChildrenRead(recorder.names[module], children_of(value)))
    elif name in ("__dict__", "_parameters", "_buffers", "_modules") and caller not in _PACKAGES:
        recorder.doubts(f"its forward looks into {name} of a module")
    return value


def _note_method(recorder: Recorder, module: nn.Module, name: str, value: Any) -> None:
    """Note a read of a method of a module. If the module is the root, a guard compares the method."""
    if isinstance(getattr(value, "__self__", None), type):
        recorder.doubts(f"its forward calls {name}, a method of its class")
        return
    function = getattr(value, "__func__", value)
    home = (getattr(function, "__module__", None) or "").partition(".")[0]
    if home in _PACKAGES or name == "forward":
        return
    if module is recorder.root:
        recorder.read(MethodRead(name, function))
    else:
        recorder.doubts(f"its forward calls {_path(module, name)}, a method of another module")


def _is_settings(value: Any) -> bool:
    """Return True for a class of user code: its attributes may be settings, which no guard compares."""
    return isinstance(value, type) and value.__module__.partition(".")[0] not in _PACKAGES


def _noted(module: nn.Module, name: str, value: Any) -> Any:
    recorder = _recorders.get(module)
    if recorder is None or name in _OF_MODULES or issubclass(type(value), fx.Proxy):
        return value
    path = _path(module, name)
    if isinstance(value, nn.Module):
        recorder.looked_at[path] += 1
        return value
    if name == "training":
        return recorder.mode_of(module)
    if isinstance(value, torch.Tensor):
        owned = recorder.owned(value)
        if owned is None:
            recorder.doubts(f"its forward reads {path}, a tensor that is no state")
            return value
        if "." in path:
            recorder.read(PresenceRead(path))
        return owned
    if isinstance(getattr(type(module), name, None), property):
        recorder.doubts(f"its forward reads {path}, a property")
        return value
    if is_constant(value):
        recorder.read(ValueRead(path, copy.deepcopy(value)))
    elif (
        isinstance(value, _FUNCTIONS)
        and not _is_settings(value)
        and inspect.getattr_static(module, name, None) is value  # a partialmethod makes a new one
    ):
        recorder.read(ObjectRead(path, value))
    else:
        recorder.doubts(f"its forward reads {path}, a {type(value).__name__}")
        if is_used_up(value):
            return recorder.copied(value)
    return value
