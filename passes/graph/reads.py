"""What a trace read and took for granted: compared again whenever the graph is called.

A trace sees one value of everything that the code reads: a number on the module, a setting of a config
object, a global, a default. It becomes a constant of the graph, or decides which way the code goes. So each
read is kept with where it came from, and the generated ``forward`` asks whether it would still give the
same: simple values by value, containers by what is in them, everything else by identity or class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from lora_fx.runtime import held_in, ops

__all__ = [
    "CONTAINERS",
    "MOST",
    "SIMPLE",
    "ModuleRoot",
    "ObjectRoot",
    "Path",
    "Read",
    "Unchanged",
    "conditions_of",
    "constants_of",
    "frozen",
    "is_constant",
]

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
"""Exact types of values that are compared by value."""

CONTAINERS = (tuple, list, dict, set, frozenset)
"""Exact types of containers that are compared by what is in them."""

_BY_IDENTITY = (torch.dtype, torch.layout, torch.memory_format, type(...), type(NotImplemented))
MOST = 256
"""How many values are compared at each call; more would take too long."""


@dataclasses.dataclass(frozen=True)
class _SelfRoot:
    """The module that the graph belongs to."""

    def resolve(self) -> None:
        """Nothing: generated code has it as an argument."""

    def __reduce__(self) -> str:
        """There is one."""
        return "_SELF"


_SELF = _SelfRoot()


@dataclasses.dataclass(frozen=True)
class ModuleRoot:
    """A Python module, by name: its globals."""

    name: str

    def resolve(self) -> Any:
        """The module."""
        return importlib.import_module(self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectRoot:
    """An object that is the same for every instance: a class, a function."""

    value: Any

    def resolve(self) -> Any:
        """The object."""
        return self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRoot) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, or from what has a name: a decorated function is found in its decorator's."""
        if isinstance(self.value, FunctionType):
            way = _way_to(self.value)
            if way is not None:
                return _reached, way
            if _named(self.value.__module__, self.value.__qualname__) is not self.value:
                # It was replaced, and what was read of it can change no more.
                names = ("__defaults__", "__kwdefaults__")
                return ObjectRoot, (SimpleNamespace(**{n: getattr(self.value, n) for n in names}),)
        return ObjectRoot, (self.value,)


_WRAPPED = -1
"""The place of what a function wraps; others are places in its closure."""


def _way_to(function: FunctionType) -> tuple[str, str, tuple[int, ...]] | None:
    """Module and qualified name of a function, and places that lead from it to another one.

    None if nothing that has a name leads there.
    """
    for named in _inside(function):
        start = _named(named.__module__, named.__qualname__)
        if isinstance(start, FunctionType):
            for found, places in _inside(start).items():
                if found is function:
                    return named.__module__, named.__qualname__, places
    return None


def _inside(function: FunctionType) -> dict[FunctionType, tuple[int, ...]]:
    """A function, those in its closure or wrapped by it, and those in theirs; each with the way there."""
    found: dict[FunctionType, tuple[int, ...]] = {function: ()}
    for one in (pending := [function]):
        inside = [(place, held_in(cell)) for place, cell in enumerate(one.__closure__ or ())]
        inside.append((_WRAPPED, (vars(one).get("__wrapped__"),)))
        for place, values in inside:
            for held in values:
                if isinstance(held, FunctionType) and held not in found:
                    found[held] = (*found[one], place)
                    pending.append(held)
    return found


def _named(module: str | None, name: str) -> Any:
    value: Any = sys.modules.get(module or "")
    for atom in name.split("."):
        value = getattr(value, atom, None)
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return getattr(value, "__func__", value)  # the function of a class method


def _reached(module: str, name: str, places: tuple[int, ...]) -> ObjectRoot:
    importlib.import_module(module)
    value = _named(module, name)
    for place in places:
        wrapped = place == _WRAPPED
        value = value.__wrapped__ if wrapped else value.__closure__[place].cell_contents
    return ObjectRoot(value)


_Root = _SelfRoot | ModuleRoot | ObjectRoot


@dataclasses.dataclass(frozen=True)
class Path:
    """Where a value was read.

    Attributes:
        root: Where it starts.
        steps: ``("attribute", name)`` and ``("item", key)``, one after the other.
    """

    root: _Root = _SELF
    steps: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def to(cls, name: str) -> Path:
        """The path of what has a dotted name in the module; of the module itself for an empty one."""
        return cls(steps=tuple(("attribute", atom) for atom in name.split(".") if atom))

    def attribute(self, name: str) -> Path:
        """The path of an attribute of what lies here."""
        return Path(self.root, (*self.steps, ("attribute", name)))

    def item(self, key: Any) -> Path:
        """The path of an item of the container that lies here."""
        return Path(self.root, (*self.steps, ("item", key)))

    def expression(self, root: str) -> str:
        """Python code that reads it.

        Args:
            root: The name of the root in that code.
        """
        text = root
        for kind, key in self.steps:
            if kind == "item":
                text = f"{text}[{key!r}]"
            elif key.isidentifier():
                text = f"{text}.{key}"
            else:
                text = f"getattr({text}, {key!r})"
        return text

    def __str__(self) -> str:
        if isinstance(self.root, ModuleRoot):
            return _in_words(self.expression(self.root.name))
        if isinstance(self.root, ObjectRoot):
            value = self.root.value
            name = getattr(value, "__qualname__", None) or type(value).__name__
            return _in_words(self.expression(name))
        return self.expression("self")


@dataclasses.dataclass(frozen=True)
class Read:
    """One read.

    Attributes:
        path: Where.
        kind: How it is compared: ``value``, ``contents``, ``identity``, ``function`` (of a property or a
            method of a class), ``class`` (of the object that lies there), ``length``, ``keys`` and ``holds``
            (of a dict, the second with a key), ``children`` and ``modules`` (the names of the modules in
            a module, and their number, without those of adapters), ``shape`` (of a tensor), ``present`` (it
            is not None),
            ``missing`` (there was no such attribute), ``there`` (there was one, and the code has a way to go
            without it), ``same`` (the object that lies at another path, too), ``answer`` (of a function, with
            what it was given) or ``tree`` (an object and all below it, :class:`lora_fx.runtime.ops.Seen`).
        expected: What the trace saw.
    """

    path: Path
    kind: str
    expected: Any = dataclasses.field(compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """With a function by its place, where it has no name of its own."""
        expected = self.expected
        if self.kind not in ("identity", "function") or not isinstance(expected, FunctionType):
            return Read, (self.path, self.kind, expected)
        if _named(expected.__module__, expected.__qualname__) is expected or _way_to(expected):
            return _read_again, (self.path, self.kind, ObjectRoot(expected))
        return Read, (self.path, self.kind, ops.Callee.of(expected))  # it has no name any more

    def condition(self, root: str, constant: str) -> str:
        """Python code that is true where the read would give something else.

        Args:
            root: The name of the path's root.
            constant: The name of what is expected, if the code needs it.
        """
        if self.kind in ("missing", "there"):
            *above, (_, name) = self.path.steps
            asked = f"hasattr({Path(self.path.root, tuple(above)).expression(root)}, {name!r})"
            return asked if self.kind == "missing" else f"not {asked}"
        here = self.path.expression(root)
        if self.kind == "holds":
            key, held = self.expected
            return f"({key!r} in {here}) is not {held}"
        if self.kind == "answer":
            return f"{_DIFFERS}({here}({_given(self.expected)}), {constant}[1])"
        if type(self.expected) is ops.Callee and self.kind in ("identity", "function"):
            return f"{_DIFFERS}({_FUNCTION}({here}), {constant})"
        if self.kind in _CONDITIONS:
            return _CONDITIONS[self.kind].format(
                here=here, constant=constant, expected=self.expected
            )
        if self.kind == "identity" or self.expected is None or isinstance(self.expected, bool):
            return f"{here} is not {constant if self.kind == 'identity' else self.expected}"
        if self.needs_constant or self.kind == "contents":
            return f"{_DIFFERS}({here}, {constant if self.needs_constant else repr(self.expected)})"
        kind = type(self.expected).__name__
        return f"type(_now := {here}) is not {kind} or _now != {self.expected!r}"

    def found(self, module: Any) -> Any:
        """What lies there now, as it is compared: its class, its length, its shape, or the value.

        Args:
            module: The module that the path may start at.
        """
        value: Any = module if self.path.root is _SELF else self.path.root.resolve()
        for kind, key in self.path.steps:
            value = value[key] if kind == "item" else getattr(value, key)
        if self.kind == "class":
            return ops.class_of(value)
        if self.kind == "function":
            return ops.function_of(value)
        if self.kind == "length":
            return len(value)
        if self.kind == "keys":
            return list(value)
        if self.kind == "children":
            return ops.children_of(value)
        if self.kind == "modules":
            return len(ops.children_of(value))
        if self.kind == "holds":
            return self.expected[0] in value
        if self.kind == "answer":
            return value(*self.expected[0])
        return tuple(value.shape) if self.kind == "shape" else value

    @property
    def needs_constant(self) -> bool:
        """Whether what is expected has no literal form, or none that tells it from others."""
        if self.kind in ("answer", "class", "function", "identity", "tree"):
            return True
        # Defaults of functions are read often, and told at once where they are the same object.
        shared = self.path.steps[-1:] == (("attribute", "__defaults__"),)
        return self.kind in ("value", "contents") and (shared or not _literal(self.expected))

    def changes(self, module: Any) -> Iterator[Read]:
        """This read, or those of a tree that would give something else now.

        Args:
            module: The module that the path may start at.
        """
        if self.kind != "tree":
            yield self
            return
        root: Any = module if self.path.root is _SELF else self.found(module)
        yield from _changes(root, self.path, self.expected, {})

    def words(self, found: str) -> str:
        """What to tell the caller of a graph that was made for something else.

        Args:
            found: What lies there now, in words.
        """
        if self.kind == "missing":
            return f"{self.path} did not exist when its forward was captured"
        if self.kind == "there":
            return f"{self.path} was there when its forward was captured"
        if self.kind == "holds":
            key, held = self.expected
            return f"{self.path} had {'a' if held else 'no'} {key!r} when its forward was captured"
        if self.kind == "answer":
            asked = f"{self.path}({_given(self.expected)})"
            return f"{asked} was {self.expected[1]!r} when its forward was captured, found {found}"
        if self.kind == "present":
            return f"{self.path} was there when its forward was captured, found None"
        if self.kind == "same":
            return f"{self.path} was {self.expected} when its forward was captured, found {found}"
        expected = self.expected
        if self.kind == "class":
            return f"{self.path} was a {expected.__qualname__} when its forward was captured, found {found}"
        if self.kind in ("identity", "function"):
            expected = getattr(expected, "__qualname__", None) or repr(expected)
        what = {
            "length": "the length of ",
            "shape": "the shape of ",
            "keys": "the keys of ",
            "children": "the list of modules in ",
            "modules": "the number of modules in ",
        }.get(self.kind, "")
        value = repr(tuple(expected)) if self.kind == "shape" else expected
        named = isinstance(value, str) and self.kind in ("identity", "function")
        value = value if named else repr(value)
        return f"{what}{self.path} was {value} when its forward was captured, found {found}"


def _read_again(path: Path, kind: str, held: ObjectRoot) -> Read:
    return Read(path, kind, held.value)


_DIFFERS = "_lora_fx_differs"
_CHILDREN = "_lora_fx_children_of"
_CLASS = "_lora_fx_class_of"
_FUNCTION = "_lora_fx_function_of"
_TREE = "_lora_fx_tree_differs"
_CONDITIONS = {
    "present": "{here} is None",
    "length": "len({here}) != {expected}",
    "keys": "list({here}) != {expected!r}",
    "children": f"{_CHILDREN}({{here}}) != {{expected!r}}",
    "modules": f"len({_CHILDREN}({{here}})) != {{expected}}",
    "shape": "{here}.shape != {expected!r}",
    "class": f"{_CLASS}({{here}}) is not {{constant}}",
    "function": f"{_FUNCTION}({{here}}) is not {{constant}}",
    "same": "{here} is not {constant}",
    "tree": f"{_TREE}({{here}}, {{constant}})",
}


def _changes(value: Any, path: Path, seen: ops.Seen, met: dict[int, Any]) -> Iterator[Read]:
    if ops.class_of(value) is not seen.cls:
        yield Read(path, "class", seen.cls)
        return
    met[seen.number] = value
    for name, expected in seen.attributes:
        here = path.attribute(name)
        yield from _changes_of(getattr(value, name, seen), here, expected, met)
    for name in seen.missing:
        if hasattr(value, name):
            yield Read(path.attribute(name), "missing", None)
    for name, shape in seen.parameters:
        here = path.attribute(name)
        if shape is None:
            yield from (
                (Read(here, "value", None),) if getattr(value, name, None) is not None else ()
            )
        elif getattr(value, name, None) is None:
            yield Read(here, "present", None)
        elif getattr(value, name).shape != shape[0]:
            yield Read(here, "shape", shape[0])
        elif getattr(value, name).dtype is not shape[1]:
            yield Read(here.attribute("dtype"), "identity", shape[1])
    if seen.inside is not None and ops.inside_of(value) != seen.inside:
        yield Read(path, "children", list(seen.inside))
    if seen.items is not None:
        yield from _changes_inside(value, path, seen.items, met)


def _changes_inside(
    value: Any, path: Path, items: tuple[tuple[Any, Any], ...], met: dict[int, Any]
) -> Iterator[Read]:
    entries = ops.entries_of(value) or []
    if [key for key, _ in entries] != [key for key, _ in items]:
        yield Read(path, "keys", [key for key, _ in items])
        return
    for (key, one), (_, expected) in zip(entries, items, strict=True):
        yield from _changes_of(one, path.item(key), expected, met)


def _changes_of(found: Any, path: Path, expected: Any, met: dict[int, Any]) -> Iterator[Read]:
    if type(expected) is ops.Seen:
        yield from _changes(found, path, expected, met)
    elif ops.part_differs(found, expected, met):
        known = met.get(expected.number) if type(expected) is ops.Again else expected
        yield Read(path, "value", known)


def _given(expected: tuple[tuple[Any, ...], Any]) -> str:
    return ", ".join(map(repr, expected[0]))


def _in_words(text: str) -> str:
    """A path that goes through a closure as a reader says it."""
    return re.sub(r"^(.*)\.__closure__\[\d+\]\.cell_contents", r"a variable around \1", text)


def conditions_of(reads: Iterable[Read]) -> Iterator[tuple[Read, str]]:
    """Each read with its condition, in terms of the names of :func:`constants_of`."""
    reads = tuple(reads)
    roots = _named_roots(reads)
    for place, read in enumerate(reads):
        constant = f"_lora_fx_value_{place}"
        if read.kind == "same":
            constant = read.expected.expression(roots[read.expected.root])
        yield read, read.condition(roots[read.path.root], constant)


def constants_of(reads: Iterable[Read]) -> dict[str, Any]:
    """The globals that the conditions of some reads need."""
    reads = tuple(reads)
    found: dict[str, Any] = {
        name: root.resolve() for root, name in _named_roots(reads).items() if root is not _SELF
    }
    for place, read in enumerate(reads):
        if read.needs_constant:
            found[f"_lora_fx_value_{place}"] = read.expected
    text = " ".join(condition for _, condition in conditions_of(reads))
    helpers = {
        _DIFFERS: ops.differs,
        _CHILDREN: ops.children_of,
        _CLASS: ops.class_of,
        _FUNCTION: ops.function_of,
        _TREE: ops.tree_differs,
    }
    return found | {name: helper for name, helper in helpers.items() if name in text}


class Unchanged:
    """Whether everything that was read of a module would be the same now: a function of the module.

    It can be pickled. Equal ones ask the same.
    """

    def __init__(self, reads: Iterable[Read]) -> None:
        self.reads = tuple(reads)
        found, tests = constants_of(self.reads), [test for _, test in conditions_of(self.reads)]
        source = f"lambda self: not ({' or '.join(tests) or False})"
        self._asked: Callable[[Any], bool] = eval(
            compile(source, "<lora_fx unchanged>", "eval"), found
        )
        constants = ((name, _told(one)) for name, one in found.items() if name != "__builtins__")
        self._key = source, frozenset(constants)

    def __call__(self, module: Any) -> bool:
        """Asks a module."""
        return self._asked(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unchanged, (self.reads,)


def _told(value: Any) -> Any:
    """What equal constants have in common."""
    simple = type(value) in SIMPLE or (type(value) in CONTAINERS and _literal(value))
    return repr(value) if simple else id(value)


def _named_roots(reads: Iterable[Read]) -> dict[_Root, str]:
    found: dict[_Root, str] = {_SELF: "self"}
    for read in reads:
        for path in (read.path, *((read.expected,) if read.kind == "same" else ())):
            found.setdefault(path.root, f"_lora_fx_root_{len(found)}")
    return found


def frozen(value: Any) -> Any:
    """A copy of a container of simple values, which its owner may change; any other value as it is."""
    if type(value) is torch.Tensor:
        return ops.HeldTensor(value)
    if type(value) is dict:
        return {key: frozen(item) for key, item in value.items()}
    if type(value) not in CONTAINERS:
        return value
    copied = type(value)(map(frozen, value))
    # A tuple that is the same object needs no further look.
    same = type(value) is tuple and all(a is b for a, b in zip(copied, value, strict=True))
    return value if same else copied


def is_constant(value: Any, most: int = MOST, simple: tuple[type, ...] = ()) -> bool:
    """Whether a value is simple, or a container of simple values that is short enough to be compared.

    Args:
        value: The value.
        most: How many simple values it may hold.
        simple: Classes that are simple, too.
    """
    return _size(value, simple) <= most


def _size(value: Any, simple: tuple[type, ...]) -> float:
    if type(value) in (*SIMPLE, *simple) or isinstance(
        value, (enum.Enum, torch.device, *_BY_IDENTITY)
    ):
        return 1
    if type(value) is dict:
        return sum(_size(one, simple) for item in value.items() for one in item)
    if type(value) in CONTAINERS or type(value) is torch.Size:
        return sum(_size(one, simple) for one in value)
    return math.inf


def _literal(value: Any) -> bool:
    """Whether ``repr`` gives code for the value, and a comparison by it tells it from all others."""
    if type(value) is float:
        # Comparison takes 0.0 and -0.0 for equal, and says that nan differs from itself.
        return math.isfinite(value) and value != 0.0
    if type(value) in (tuple, list):
        return all(map(_literal, value))
    if type(value) is dict:
        return all(_literal(key) and _literal(item) for key, item in value.items())
    return type(value) in (bool, int, str, type(None))
