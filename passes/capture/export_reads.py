"""Notes what the code of a model reads while ``torch.export`` runs it.

An export runs the code as it is, so that no rule sees its reads. Instead, the classes of its modules, and of
the plain objects that they hold, have for that time an attribute access that takes notes of those objects and
of no others. Which objects functions get to by globals, by classes and by variables around them is read off
their code, and those objects are watched as well. Each becomes a
:class:`~lora_fx.passes.graph.reads.Read` of the kind ``tree``, which guards the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    GenericAlias,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.passes.capture.export_questions import answer_of, of_library
from lora_fx.passes.graph import (
    CONTAINERS,
    MOST,
    SIMPLE,
    ModuleRoot,
    ObjectRoot,
    Path,
    Read,
    frozen,
    is_constant,
    named_by,
    nested,
    stands_apart,
)
from lora_fx.runtime import held_in, ops

__all__ = ["NamedReads", "ObjectReads", "replaced_forwards"]

_OWN = frozenset((*nn.Module().__dict__, "training", "forward"))
# What copies and pickles an object reads of it: C code then takes all that it has.
_COPYING = frozenset({"__reduce__", "__reduce_ex__", "__getstate__"})
_NEVER = (nn.Module, torch.Tensor, type, ModuleType, torch.Generator)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
_TENSORS = (torch.Tensor,)  # and no parameters, which the graph has
_MISSING, _UNKNOWN = object(), object()


class ObjectReads:
    """What was read, by object.

    Attributes:
        classes: Classes that were found in an object: code may read what they have.
        refused: What cannot be guarded, in words.
    """

    def __init__(self, model: nn.Module, named: dict[Path, Any]) -> None:
        """Prepares.

        Args:
            model: A copy that is used nowhere else.
            named: Objects that the code has by name, by where they are.
        """
        self.classes: set[type] = set()
        self.refused: list[str] = []
        self._model = model
        self._named = named
        self._reads: dict[int, dict[str, Any]] = {}
        self._items: dict[int, tuple[tuple[Any, Any], ...]] = {}
        self._watched: dict[int, Any] = {}
        self._patched: dict[type, dict[str, Any]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Takes notes in between, of this model alone."""
        self._watched = {_identity(module): module for module in self._model.modules()}
        try:
            # Asked before one is watched: all seem to have a way of their own from then on.
            own = [cls for cls in {*map(type, self._watched.values())} if _own_access(cls)]
            for cls in dict.fromkeys((nn.Module, *own)):
                self._watch_class(cls)
            for path, value in self._named.items():
                if id(value) not in self._watched:
                    self._watch(value, str(path))
            yield
        finally:
            for cls, members in self._patched.items():
                for name, member in members.items():
                    if member is _MISSING:
                        delattr(cls, name)
                    else:
                        setattr(cls, name, member)
            self._patched.clear()
            self._drop_written()

    @property
    def reads(self) -> Iterator[Read]:
        """What was read: one guard of the model, and one of each object that the code has by name."""
        yield Read(Path(), "tree", self._seen(self._model, {}))
        for path, value in self._named.items():
            seen = self._seen(value, {})
            if seen.attributes or seen.missing or seen.items is not None:
                yield Read(path, "tree", seen)

    def forget(self, owner: Any, name: str) -> Any:
        """Takes a note back: what was read of an object under a name, or None.

        Args:
            owner: The object.
            name: The attribute.
        """
        return self._reads.get(_identity(owner), {}).pop(name, None)

    def _watch_class(self, cls: type) -> None:
        """Has the attribute access of a class take notes of the objects that are watched.

        Raises:
            TypeError: For a class of C.
        """
        if cls in self._patched:
            return
        access: Any = cls.__getattribute__
        hook = getattr(cls, "__getattr__", None)

        def read(this: Any, name: str) -> Any:
            value = access(this, name)
            if name == "__dict__" and _asked_by_torch(sys._getframe(1)):
                return value._own if isinstance(value, _Entries) else value
            return self._found(this, name, value) if _identity(this) in self._watched else value

        def looked_for(this: Any, name: str) -> Any:
            assert hook is not None
            try:
                value = hook(this, name)
            except AttributeError:
                if _identity(this) in self._watched and not _asked_by_torch(sys._getframe(1)):
                    self._note(this, name, _MISSING)
                raise
            if _identity(this) in self._watched:
                self._note(this, name, value)
            return value

        members: dict[str, Any] = {"__getattribute__": read}
        if hook is not None:
            members["__getattr__"] = looked_for
        kept = {name: cls.__dict__.get(name, _MISSING) for name in members}
        for name, member in members.items():
            setattr(cls, name, member)
        self._patched[cls] = kept

    def _found(self, owner: Any, name: str, value: Any) -> Any:
        """Notes what an object has under a name, and says what the code is given."""
        if name == "__dict__" and type(value) is dict:
            return _Entries(value, lambda key, one: self._note_entry(owner, key, one))
        if name in _COPYING:
            self._note_all(owner)
        # What a class has is looked at elsewhere.
        if not isinstance(value, _FUNCTIONS) or _holds(owner, name):
            self._note(owner, name, value)
        return value

    def _watch(self, value: Any, words: str) -> None:
        """Watches an object; one whose class is of C is noted as a whole.

        Args:
            value: The object.
            words: Where it is.
        """
        self._watched[_identity(value)] = value
        entries = ops.entries_of(value)
        if entries is not None:
            self._items[id(value)] = tuple(
                (key, self._note_of(one, f"{words}[{key!r}]")) for key, one in entries
            )
        if not _has_attributes(value):
            return
        try:
            self._watch_class(type(value))
        except TypeError:
            self._note_all(value)

    def _note_all(self, value: Any) -> None:
        slots = (getattr(cls, "__slots__", ()) for cls in type(value).__mro__)
        named = [
            n for several in slots for n in ((several,) if isinstance(several, str) else several)
        ]
        for name in (*getattr(value, "__dict__", ()), *named):
            if not name.startswith("__") and hasattr(value, name):
                self._note(value, name, getattr(value, name))

    def _note_entry(self, owner: Any, name: Any, value: Any) -> None:
        """Notes what was looked up in the dict of an object; where it has none, what stands in its class."""
        if not isinstance(name, str):
            return
        if value is _MISSING:
            above = (cls.__dict__ for cls in type(owner).__mro__)
            value = next((one[name] for one in above if name in one), _MISSING)
        self._note(owner, name, value)

    def _note(self, owner: Any, name: str, value: Any) -> None:
        if name in _OWN or name.startswith(("__", "_lora_fx")) or _is_buffer(owner, name):
            return
        known = self._reads.setdefault(_identity(owner), {})
        if name in known:
            return
        note = value
        if value is not _MISSING:
            note = self._note_of(value, f"{name} of a {type(owner).__name__}")
        if note is not _UNKNOWN:
            known[name] = note

    def _note_of(self, value: Any, words: str) -> Any:
        """What is compared of a value; an object that is watched from now on stands for itself.

        Args:
            value: The value.
            words: Where it is.
        """
        if isinstance(value, np.ndarray):
            return _array(words, value)
        if isinstance(value, np.generic) or is_constant(value, simple=_TENSORS):
            with torch_private.disable_dispatch_modes():  # no part of what is exported
                return frozen(value)
        if isinstance(value, SIMPLE):  # of a class of its own
            return value
        within = getattr(value, "__args__", ()) if isinstance(value, GenericAlias) else (value,)
        self.classes.update(one for one in within if isinstance(one, type))
        if isinstance(value, type):
            return value
        if isinstance(value, _FUNCTIONS):
            return value if _importable(value) else ops.Callee.of(value)
        if isinstance(value, ModuleType):
            return ops.Callee.of(value)
        if isinstance(value, (torch.Tensor, torch.Generator)):
            return _UNKNOWN  # the graph has it, or the state of the model
        held = isinstance(value, nn.Module) or ops.entries_of(value) is not None
        apart = stands_apart(type(value).__module__) and not _of_library(type(value))
        if not held and (apart or not _is_plain(value)):
            return self._state_of(value, words, refused=not apart or not _has_attributes(value))
        if _identity(value) not in self._watched:
            self._watch(value, words)
        return _Held(self._watched[_identity(value)])  # no stand-in for a module

    def _state_of(self, value: Any, words: str, refused: bool) -> Any:
        """What an object of C, or of Python's own library, is: its name if it is called, else its pickle.

        Args:
            value: The object.
            words: Where it is.
            refused: Whether one that cannot be pickled ends the capture.
        """
        if callable(value):
            return ops.Callee.of(value)
        try:
            return ops.Pickled.of(value)
        except (TypeError, ValueError, AttributeError, pickle.PicklingError):
            if refused:
                self.refused.append(f"reads {words}, a {type(value).__name__} that may change")
            return _UNKNOWN

    def _drop_written(self) -> None:
        """Forgets what the code itself has set since: the next call finds what this one has left."""
        for key, value in self._watched.items():
            reads = self._reads.get(key, {})
            for name, old in list(reads.items()):
                now = getattr(value, name, _MISSING)
                if now is not old.value if type(old) is _Held else ops.differs(now, old):
                    del reads[name]
            if key in self._items and not self._same_items(value, self._items[key]):
                del self._items[key]

    def _same_items(self, value: Any, items: tuple[tuple[Any, Any], ...]) -> bool:
        entries = ops.entries_of(value) or []
        return len(entries) == len(items) and all(
            now is old.value if type(old) is _Held else old is _UNKNOWN or not ops.differs(now, old)
            for (_, now), (_, old) in zip(entries, items, strict=True)
        )

    def _seen(self, value: Any, done: dict[int, int]) -> ops.Seen:
        number = done[_identity(value)] = len(done)
        found = self._reads.get(_identity(value), {})
        missing = tuple(name for name, one in found.items() if one is _MISSING)
        noted = [(name, one) for name, one in found.items() if one is not _MISSING]
        parameters: tuple[tuple[str, Any], ...] = ()
        if isinstance(value, nn.Module):
            named = {name for name, _ in noted}
            noted += [
                (name, None if child is None else _Held(child))
                for name, child in value._modules.items()
                if name not in named
            ]
            own = {**value._parameters, **value._buffers}
            parameters = tuple((name, ops.shape_of(one)) for name, one in own.items())
        attributes = tuple((name, self._below(one, done)) for name, one in noted)
        items = self._items.get(id(value))
        if items is not None:
            items = tuple((key, self._below(one, done)) for key, one in items)
        inside, cls = ops.inside_of(value), ops.class_of(value)
        return ops.Seen(cls, attributes, missing, parameters, inside, items, number)

    def _below(self, note: Any, done: dict[int, int]) -> Any:
        """A note as it is compared: objects become what was seen of them."""
        if note is _UNKNOWN:
            return ops.ANYTHING
        if type(note) is not _Held:
            return note
        known = done.get(_identity(note.value))
        return self._seen(note.value, done) if known is None else ops.Again(known)


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """An object that is watched, in a note."""

    value: Any


class _Entries(dict[Any, Any]):
    """The dict of an object, for code that takes hold of it: says what is looked up in it.

    It is a dict with the same entries, for code of C that looks past its methods. What is written goes
    to the object.
    """

    def __init__(self, own: dict[str, Any], note: Callable[[Any, Any], None]) -> None:
        super().__init__(own)
        self._own, self._note = own, note

    def _all(self) -> dict[str, Any]:
        for key, value in self._own.items():
            self._note(key, value)
        return self._own

    def __getitem__(self, key: Any) -> Any:
        self._note(key, self._own.get(key, _MISSING))
        return self._own[key]

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key, self._own.get(key, _MISSING))
        return self._own.get(key, default)

    def __contains__(self, key: Any) -> bool:
        self._note(key, self._own.get(key, _MISSING))
        return key in self._own

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._own[key] = value

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        del self._own[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self._all()),)


def _of_all(name: str) -> Any:
    """A method of a dict that looks at everything in it."""

    def looked(self: _Entries, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._all(), name)(*args, **kwargs)

    return looked


def _writing(name: str) -> Any:
    """A method of a dict that writes to it."""

    def written(self: _Entries, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._all(), name)(*args, **kwargs)
        dict.clear(self)
        dict.update(self, self._own)
        return result

    return written


for _name in ("copy", "items", "keys", "values", "__iter__", "__reversed__", "__len__", "__repr__"):
    setattr(_Entries, _name, _of_all(_name))
for _name in ("__eq__", "__ne__", "__or__", "__ror__"):
    setattr(_Entries, _name, _of_all(_name))
for _name in ("clear", "pop", "popitem", "setdefault", "update", "__ior__"):
    setattr(_Entries, _name, _writing(_name))


def _array(words: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy of an array, which its owner may change."""
    if value.size > MOST:
        raise CaptureError(
            f"its forward reads {words}, a NumPy array of {value.size} values that may change: make it a "
            "buffer"
        )
    return value.copy()


def _importable(function: Any) -> bool:
    """Whether a function is what its module has under its name, so that it is known by identity."""
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for atom in getattr(function, "__qualname__", "<").split("."):
        found = getattr(found, atom, None)
    return found is function


def _is_buffer(owner: Any, name: str) -> bool:
    return isinstance(owner, nn.Module) and name in owner._buffers


def _holds(value: Any, name: str) -> bool:
    """Whether an attribute is an object's own, and not that of its class."""
    try:
        return name in object.__getattribute__(value, "__dict__")
    except AttributeError:  # it has slots
        return True


def _identity(value: Any) -> int:
    """What tells an object from others; of a module also where export hands out a stand-in for it.

    It does so for every module of a model in which one has several names. They have the same ``__dict__``.
    """
    if issubclass(type(value), nn.Module):  # isinstance would ask the object
        return id(object.__getattribute__(value, "__dict__"))
    return id(value)


def _asked_by_torch(caller: FrameType) -> bool:
    """Whether PyTorch asks: its stand-ins of modules take over the dict itself."""
    return str(caller.f_globals.get("__name__")).startswith("torch.")


def _own_access(cls: Any) -> bool:
    """Whether a class looks attributes up in a way of its own, which may not come to that of PyTorch."""
    usual: Any = nn.Module
    return bool(
        cls.__getattribute__ is not object.__getattribute__
        or cls.__getattr__ is not usual.__getattr__
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is an object with attributes; what libraries call is none."""
    if isinstance(value, _NEVER) or (callable(value) and _of_library(type(value))):
        return False
    return _has_attributes(value)


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


class NamedReads:
    """What the code of a model has by name: of globals, of classes, and of variables around functions.

    What its functions name, and those that they name, is looked at, not what they execute: a guard too many
    costs a comparison. Functions in containers count as named by code next to the classes of the modules: a
    library has long lists of them.

    Attributes:
        reads: Constants and functions, by where they are.
        objects: Other objects, by where they are: what code reads of them is known when it runs.
    """

    def __init__(self, model: nn.Module, classes: Iterable[type] = ()) -> None:
        """Looks.

        Args:
            model: The model.
            classes: Further classes that its code gets to.
        """
        self.reads: dict[Path, Read] = {}
        self.objects: dict[Path, Any] = {}
        own: set[Any] = {ops.class_of(module) for module in model.modules()}
        self._own = {cls for cls in (*own, *classes) if not _of_library(cls)}
        self._homes = {cls.__module__ for cls in own}
        self._pending: list[tuple[Any, Path | None]] = []
        self._names: dict[str, None] = {}
        self._asked: dict[str, None] = {}
        self._classes: dict[Any, None] = dict.fromkeys((*own, *classes))
        self._done: set[Any] = set()
        for cls in own:
            self._pending.append((cls.forward, None))
            for name in ("__call__", "forward"):
                path = Path(ObjectRoot(cls)).attribute(name)
                self.reads[path] = Read(path, "identity", getattr(cls, name))
        # Code gets to the classes above by super(), past what a class has in their place.
        above = {one for cls in own for one in cls.__mro__[1:] if not _of_library(one)} - own
        for cls, name in itertools.product(above, ("__call__", "forward")):
            if name in vars(cls):
                self._note_function(Path(ObjectRoot(cls)).attribute(name), vars(cls)[name])
                self._pending.append((vars(cls)[name], None))
        for name in replaced_forwards(model):
            path = Path.to(name).attribute("forward")
            function = ops.function_of(model.get_submodule(name).forward)
            self.reads[path] = Read(path, "function", function)
            self._pending.append((function, path))
        for name, module in model.named_modules():
            for key, value in module.__dict__.items():
                if key not in _OWN:
                    self._look_at(value, Path.to(name).attribute(key))
        while self._pending or self._add_members():
            if self._pending:
                self._follow(*self._pending.pop())

    def _look_at(self, value: Any, path: Path) -> None:
        """Takes note of the functions and classes in an object that a module holds."""
        found = list(_functions_in(value, path))
        self._pending += [(one, at or (path if one is value else None)) for one, at in found]
        if isinstance(value, type):
            self._classes[value] = None
            self._own.add(value)
        elif not found and _is_plain(value) and id(value) not in self._done:
            self._done.add(id(value))
            self._classes[type(value)] = None
            self._own.add(type(value))
            for key, one in getattr(value, "__dict__", {}).items():
                self._look_at(one, path.attribute(key))

    def _follow(self, found: Any, place: Path | None) -> None:
        """Looks at what a function names."""
        found = found.fget if isinstance(found, property) else found
        named: Any = getattr(found, "__func__", found)
        function = inspect.unwrap(named)
        if not isinstance(function, FunctionType) or _of_library(function):
            return
        place = place if function is found else None  # what is wrapped is not what lies there
        # A function that leads to itself has a new path each time.
        if (function, place is None) in self._done:
            return
        self._done.add((function, place is None))
        for path, value in _named(function, place):
            self._take(path, value, function.__module__ in self._homes)
        for code in nested(function.__code__):
            self._names.update(dict.fromkeys(code.co_names))
            spelled = [one for one in code.co_consts if isinstance(one, str) and one.isidentifier()]
            self._names.update(dict.fromkeys(spelled))
            if _asks_classes(code):
                self._asked.update(dict.fromkeys(spelled))

    def _take(self, path: Path, value: Any, at_home: bool) -> None:
        """Notes what a name stands for."""
        answer = answer_of(value)
        if answer is not None:
            self.reads.setdefault(answer.path, answer)
        elif isinstance(value, type):
            if not _of_library(value):
                self._classes[value] = None
                self._own.update((value,) if at_home else ())
        elif is_constant(value, simple=_TENSORS):
            self.reads.setdefault(path, Read(path, "contents", frozen(value)))
        elif isinstance(value, FunctionType | MethodType):
            self._note_function(path, value)
            self._pending.append((value, path if isinstance(value, FunctionType) else None))
            for name, held in vars(value).items() if not _of_library(value) else ():
                if not name.startswith("_"):
                    self._take(path.attribute(name), held, at_home)
        elif isinstance(value, property):
            self._note_function(path, value)
            self._pending.append((value, None))
        elif ops.entries_of(value) is not None or (
            _is_plain(value) and not stands_apart(type(value).__module__)
        ):
            self.objects.setdefault(path, value)
            self._classes[type(value)] = None
            if at_home:
                self._pending += _functions_in(value, path)

    def _note_function(self, path: Path, value: Any) -> None:
        function = ops.function_of(value)
        if isinstance(function, FunctionType) and not _of_library(function):
            kind = "identity" if function is value else "function"
            self.reads.setdefault(path, Read(path, kind, function))

    def _add_members(self) -> bool:
        """Notes what classes have under the names that the code has; whether there was something new."""
        for cls in tuple(self._classes):  # and those above, as for super()
            self._classes.update(
                dict.fromkeys(one for one in cls.__mro__[1:] if not _of_library(one))
            )
        new = [
            (cls, name)
            for cls, name in itertools.product(tuple(self._classes), tuple(self._names))
            if (cls, name) not in self._done
        ]
        for cls, name in new:
            self._done.add((cls, name))
            if not stands_apart(type(cls).__module__):
                self._classes[type(cls)] = None
            owner = next((one for one in cls.__mro__ if name in one.__dict__), None)
            path = Path(ObjectRoot(cls)).attribute(name)
            if owner is None:
                if name in self._asked and cls in self._own and not name.startswith("__"):
                    self.reads.setdefault(path, Read(path, "missing", None))
            elif not _of_library(owner) and name not in _OWN:
                value = owner.__dict__[name]
                if isinstance(value, classmethod | staticmethod):
                    value = getattr(cls, name)
                if hasattr(type(value), "__get__") and not isinstance(
                    value, (*_FUNCTIONS, property)
                ):
                    path = Path(ObjectRoot(owner)).attribute("__dict__").item(name)
                self._take(path, value, True)
        return bool(new)


def _asks_classes(code: CodeType) -> bool:
    """Whether code may ask a class for an attribute that it may lack."""
    first = code.co_varnames[:1] if code.co_argcount else ()
    named = {"type", "__class__"}.isdisjoint(code.co_names)
    return not {"getattr", "hasattr"}.isdisjoint(code.co_names) and not (
        first == ("self",) and named
    )


def replaced_forwards(model: nn.Module) -> list[str]:
    """The modules of a model on which a function was set as their ``forward``, by FQN."""
    kinds = FunctionType | MethodType
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module.__dict__.get("forward"), kinds)
    ]


def _functions_in(value: Any, path: Path | None) -> Iterator[tuple[Any, Path | None]]:
    """A function, or those in a container, each with where it is found in that."""
    kinds = FunctionType | MethodType
    if isinstance(value, kinds):
        yield value, None
    elif type(value) in CONTAINERS:
        for key, one in value.items() if type(value) is dict else enumerate(value):
            if isinstance(one, kinds):
                named = path is not None and type(key) in (str, int) and type(value) is not set
                yield one, path.item(key) if path and named else None


def _of_library(function: Any) -> bool:
    return of_library(function.__module__)


def _named(function: FunctionType, place: Path | None) -> Iterator[tuple[Path, Any]]:
    module = function.__globals__.get("__name__", "")
    known = sys.modules.get(module)
    importable = known is not None and vars(known) is function.__globals__
    names = {one for code in nested(function.__code__) for one in code.co_consts}
    spelled = {one for one in names if isinstance(one, str) and one in function.__globals__}
    found = list(named_by(function))
    if any("globals" in code.co_names for code in nested(function.__code__)):
        found += [(name, module, name, function.__globals__[name]) for name in sorted(spelled)]
    own = Path(ModuleRoot(module)) if importable else Path(ObjectRoot(function.__globals__))
    for words, home, name, value in found:
        if home != module and getattr(sys.modules.get(home), name, _MISSING) is value:
            yield Path(ModuleRoot(home)).attribute(name), value
            continue
        first, *rest = words.split(".")
        path = own.attribute(first) if importable else own.item(first)
        for one in rest:
            path = path.attribute(one)
        yield path, value
    root = place or Path(ObjectRoot(function))
    for name in ("__defaults__", "__kwdefaults__"):
        yield root.attribute(name), getattr(function, name) or None
    for number, cell in enumerate(function.__closure__ or ()):
        held = root.attribute("__closure__").item(number)  # by names: a cell cannot be pickled
        for value in held_in(cell):
            yield held.attribute("cell_contents"), value
