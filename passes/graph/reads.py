"""What a trace took for granted of its module: compared again whenever the graph is called.

A trace sees one value of everything that the code reads of ``self``: a number, a setting of a config object,
the layers in a list. It becomes a constant of the graph, or decides which way the code goes. So the generated
``forward`` asks whether each would still be the same, and runs the module's own forward if one is not.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lora_fx.runtime import BASE, AdapterModule, base_parameter

__all__ = [
    "BASE_OF",
    "CHILDREN_OF",
    "FORWARD",
    "Read",
    "Unchanged",
    "children_of",
    "conditions_of",
    "constants_of",
    "is_constant",
]

FORWARD = "_lora_fx_forward"
"""Global name of the forward that a class had when the graph was installed, in generated code."""

BASE_OF = "_lora_fx_parameter"
"""Global name of :func:`lora_fx.runtime.base_parameter` in generated code."""

CHILDREN_OF = "_lora_fx_children"
"""Global name of :func:`children_of` in generated code."""

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_IDENTICAL = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
_MOST = 64  # values in a container


@dataclasses.dataclass(frozen=True)
class Read:
    """Something that was read.

    Attributes:
        path: Attribute names from the module, as ``config.scale``; empty for the module itself.
        kind: How it is compared: by ``value``, by ``identity``, whether it is ``present`` (a module or a
            parameter), by the ``shape`` of a parameter, by the names of the ``children`` of a container of
            modules, as the ``forward`` or another ``method`` of the module's own class, or as a ``global`` of
            that name.
        expected: What it was; None where that follows from the kind. For a global, its module and value.
    """

    path: str
    kind: Literal[
        "value", "identity", "present", "shape", "children", "forward", "method", "global"
    ]
    expected: Any

    def condition(self, constant: str) -> str:
        """Return code that is true if it is something else now.

        Args:
            constant: The global name of ``expected`` in that code.
        """
        owner, _, leaf = self.path.rpartition(".")
        here, owner = _spelled(self.path), _spelled(owner)
        if self.kind == "children":
            return f"{CHILDREN_OF}({here}._modules) != {self.expected!r}"
        if self.kind == "present":
            return f"{BASE_OF}({owner}, {leaf!r}) is None"
        if self.kind == "shape":
            return f"{BASE_OF}({owner}, {leaf!r}).shape != {self.expected!r}"
        if self.kind == "forward":
            return f"self.{BASE}.forward is not {FORWARD}"
        if self.kind == "method":
            return f"self.{BASE}.{self.path} is not {constant}"
        if self.kind == "global":
            return f"{constant}[0].get({self.path!r}) != {constant}[1]"
        if self.kind == "identity" or isinstance(self.expected, _IDENTICAL):
            return f"{here} is not {constant}"
        if self.expected is None or isinstance(self.expected, bool):
            return f"{here} is not {self.expected!r}"
        return (
            f"{here} != {self.expected!r}" if _literal(self.expected) else f"{here} != {constant}"
        )

    def constant(self) -> Any:
        """Return the global that the condition needs."""
        if self.kind != "global":
            return self.expected
        module, value = self.expected
        return vars(importlib.import_module(module)), value


def _spelled(path: str) -> str:
    """Return the code that gets to an attribute; layers in lists have numbers for names."""
    code = "self"
    for name in path.split(".") if path else ():
        code = f"{code}.{name}" if name.isidentifier() else f"getattr({code}, {name!r})"
    return code


def conditions_of(reads: Iterable[Read]) -> Iterator[str]:
    """Yield the condition of each read, in terms of the names of :func:`constants_of`."""
    return (read.condition(f"_lora_fx_value_{place}") for place, read in enumerate(reads))


def constants_of(reads: Iterable[Read]) -> dict[str, Any]:
    """Return the globals that the conditions of some reads need."""
    named = [(f"_lora_fx_value_{place}", read) for place, read in enumerate(reads)]
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
    """A function of a module that says whether everything that was read of it would be the same now.

    It can be pickled. Equal functions ask the same.
    """

    def __init__(self, cls: type[nn.Module], reads: Iterable[Read]) -> None:
        """Take what was read.

        Args:
            cls: The module's own class.
            reads: What was read of such a module.
        """
        self.cls, self._forward = cls, cls.forward
        self.reads = tuple(read for read in reads if read.kind not in ("forward", "method"))
        tests = " or ".join(conditions_of(self.reads)) or "False"
        source = f"lambda self: not ({tests})"
        code = compile(source, "<lora_fx unchanged>", "eval")
        constants = constants_of(self.reads)
        self._asked: Callable[[Any], bool] = eval(code, dict(constants))
        self._key = cls, source, tuple((name, repr(value)) for name, value in constants.items())

    def __call__(self, module: Any) -> bool:
        """Ask a module."""
        return self.cls.forward is self._forward and self._asked(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Unchanged, (self.cls, self.reads)


def is_constant(value: Any) -> bool:
    """Return True for a simple value, or a container of so few simple values that it can be compared."""
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
