"""Values that a trace read from its module, which are compared again whenever the graph is called.

A trace sees one value of everything that the code reads from ``self``: a number, a setting of a config
object, the layers in a list. The value becomes a constant of the graph, or decides a branch. So the
generated ``forward`` compares each value, and runs the module's own forward if one has changed.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.runtime import base_parameter
from lora_fx.runtime.modules import BASE, AdapterModule

__all__ = [
    "BASE_OF",
    "CHILDREN_OF",
    "FORWARD",
    "ChildrenRead",
    "ForwardRead",
    "GlobalRead",
    "MethodRead",
    "ObjectRead",
    "PresenceRead",
    "Read",
    "ShapeRead",
    "Unchanged",
    "ValueRead",
    "children_of",
    "conditions_of",
    "constants_of",
    "is_constant",
]

FORWARD = "_lora_fx_forward"
"""Global name, in generated code, of the forward that a class had when the graph was installed."""

BASE_OF = "_lora_fx_parameter"
"""Global name of :func:`lora_fx.runtime.base_parameter`, in generated code."""

CHILDREN_OF = "_lora_fx_children"
"""Global name of :func:`children_of`, in generated code."""

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_IDENTICAL = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
_MOST = 64  # values in a container


@dataclasses.dataclass(frozen=True)
class Read:
    """Value that a trace read. Each subclass compares it in its own way.

    Attributes:
        path: Attribute names from the module, such as ``config.scale``; empty for the module itself.
    """

    path: str

    def condition(self, constant: str) -> str:
        """Return a Python expression that is true if the value has changed.

        Args:
            constant: The global name that stands for the result of :meth:`constant` in the expression.
        """
        raise NotImplementedError

    def constant(self) -> Any:
        """Return the value of the global that :meth:`condition` uses; None if there is no such global."""
        return None

    @property
    def attribute(self) -> str:
        """The Python expression that reads the attribute."""
        return _spelled(self.path)

    @property
    def parameter(self) -> str:
        """The Python expression that reads a module or a parameter of the base, or None if it is absent."""
        owner, _, leaf = self.path.rpartition(".")
        return f"{BASE_OF}({_spelled(owner)}, {leaf!r})"


@dataclasses.dataclass(frozen=True)
class ObjectRead(Read):
    """Attribute that has to stay the same object."""

    expected: Any

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"{self.attribute} is not {constant}"

    def constant(self) -> Any:
        """Return the object."""
        return self.expected


@dataclasses.dataclass(frozen=True)
class ValueRead(ObjectRead):
    """Attribute that has to stay equal to a simple value; see :func:`is_constant`."""

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        if isinstance(self.expected, _IDENTICAL):
            return super().condition(constant)
        if self.expected is None or isinstance(self.expected, bool):
            return f"{self.attribute} is not {self.expected!r}"
        value = repr(self.expected) if _literal(self.expected) else constant
        return f"{self.attribute} != {value}"


@dataclasses.dataclass(frozen=True)
class PresenceRead(Read):
    """Module or parameter that has to exist."""

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"{self.parameter} is None"


@dataclasses.dataclass(frozen=True)
class ShapeRead(Read):
    """Shape of a parameter that the trace has read, and that a guard compares."""

    shape: tuple[int, ...]

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"{self.parameter}.shape != {self.shape!r}"


@dataclasses.dataclass(frozen=True)
class ChildrenRead(Read):
    """Names of the modules in a container, which have to stay the same; see :func:`children_of`."""

    names: tuple[str, ...]

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"{CHILDREN_OF}({self.attribute}._modules) != {self.names!r}"


@dataclasses.dataclass(frozen=True)
class ForwardRead(Read):
    """The ``forward`` of the module's own class, which has to stay the same function."""

    path: str = ""

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"self.{BASE}.forward is not {FORWARD}"


@dataclasses.dataclass(frozen=True)
class MethodRead(ObjectRead):
    """A method of the module's own class, which has to stay the same. The path is the method's name."""

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"self.{BASE}.{self.path} is not {constant}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle finds functions by name. If that would find another one, store None, so that the guard fails.
        return MethodRead, (self.path, self.expected if _is_findable(self.expected) else None)


@dataclasses.dataclass(frozen=True)
class GlobalRead(Read):
    """A global of a Python module, which has to stay equal. The path is the name of the global.

    Attributes:
        module: Name of the Python module.
        value: The value.
    """

    module: str
    value: Any

    def condition(self, constant: str) -> str:
        """Return the comparison; see :class:`Read`."""
        return f"{constant}[0].get({self.path!r}) != {constant}[1]"

    def constant(self) -> Any:
        """Return the globals of the module, and the value."""
        return vars(importlib.import_module(self.module)), self.value


def _is_findable(function: Any) -> bool:
    """Return True if a function can be found by its module and name, as pickle does."""
    try:
        named: Any = pkgutil.resolve_name(f"{function.__module__}:{function.__qualname__}")
    except (AttributeError, ImportError, ValueError):
        return False
    return named is function


def _spelled(path: str) -> str:
    """Return a Python expression that reads an attribute path from ``self``, such as ``layers.0.scale``."""
    code = "self"
    for name in path.split(".") if path else ():
        code = f"{code}.{name}" if name.isidentifier() else f"getattr({code}, {name!r})"
    return code


def conditions_of(reads: Iterable[Read]) -> Iterator[str]:
    """Yield the condition of each read. The conditions use the names of :func:`constants_of`."""
    return (read.condition(f"_lora_fx_value_{index}") for index, read in enumerate(reads))


def constants_of(reads: Iterable[Read]) -> dict[str, Any]:
    """Return the globals that the conditions of some reads need."""
    named = [(f"_lora_fx_value_{index}", read) for index, read in enumerate(reads)]
    known = {name: read.constant() for name, read in named if name in read.condition(name)}
    text = " ".join(read.condition(name) for name, read in named)
    helpers = {BASE_OF: base_parameter, CHILDREN_OF: children_of}
    return known | {name: helper for name, helper in helpers.items() if name in text}


def children_of(modules: Mapping[str, nn.Module | None]) -> tuple[str, ...]:
    """Return the names of the modules in a container, without those that hold adapters."""
    return tuple(
        name
        for name, child in modules.items()
        if child is not None and not isinstance(child, AdapterModule)
    )


class Unchanged:
    """Predicate of a module that is true if the values that a trace read from the module are unchanged.

    The predicate can be pickled. Equal predicates check the same values.
    """

    def __init__(self, cls: type[nn.Module], reads: Iterable[Read]) -> None:
        """Compile the comparison of the values.

        Args:
            cls: The module's own class.
            reads: The values that were read.
        """
        self.cls, self._forward = cls, cls.forward
        self.reads = tuple(
            read for read in reads if not isinstance(read, (ForwardRead, MethodRead))
        )
        tests = " or ".join(conditions_of(self.reads)) or "False"
        source = f"lambda self: not ({tests})"
        code = compile(source, "<lora_fx unchanged>", "eval")
        constants = constants_of(self.reads)
        self._asked: Callable[[Any], bool] = eval(code, dict(constants))
        self._key = cls, source, tuple((name, repr(value)) for name, value in constants.items())

    def __call__(self, module: Any) -> bool:
        """Return True if the values of a module are unchanged."""
        return self.cls.forward is self._forward and self._asked(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unchanged, (self.cls, self.reads)


def is_constant(value: Any) -> bool:
    """Return True for a simple value, or a container of at most 64 simple values: a guard can compare it."""
    return _size(value) <= _MOST


def _size(value: Any) -> float:
    if type(value) in _SIMPLE or isinstance(value, _IDENTICAL):
        return 1
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return sum(map(_size, value))
    return math.inf


def _literal(value: Any) -> bool:
    """Return True if ``repr`` gives code for the value."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in (tuple, list):
        return all(map(_literal, value))
    return type(value) in (bool, int, str, type(None))
