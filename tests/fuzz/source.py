"""The source text of a program while it is written: a module, and the classes in it."""

from __future__ import annotations

import textwrap

from tests.fuzz.choices import Choices

__all__ = ["BATCH", "LENGTH", "Scope", "Source"]

BATCH, LENGTH = 2, 3

_MODULES = (
    "array",
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "itertools",
    "json",
    "math",
    "operator",
    "os",
    "random",
    "re",
    "threading",
    "types",
    "weakref",
)
_IMPORTS = "\n".join(f"import {name}" for name in _MODULES)
_HEAD = f"""\
{_IMPORTS}

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""


class Source:
    """A module.

    Attributes:
        choices: What decides.
        preamble: What stands before the classes.
        classes: The text of each class, those that others use first.
        setup: Statements on ``m``, the new model, in ``build``.
        changes: Statements on ``m`` in ``change``.
        calls: Each a method's name, and the text of arguments and keyword arguments.
        grad: Whether gradients can be asked for.
        low: Whether something is computed in fp32.
        stateful: Whether a call depends on those before it.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.preamble: list[str] = []
        self.classes: list[str] = []
        self.setup: list[str] = []
        self.changes: list[str] = []
        self.calls: list[str] = []
        self.grad = True
        self.low = False
        self.stateful = False
        self._count = 0

    def name(self, stem: str) -> str:
        """A name that nothing else has."""
        self._count += 1
        return f"{stem}{self._count}"

    def before(self, text: str) -> None:
        """Puts a function, a class or a global before the classes, once."""
        text = textwrap.dedent(text).strip("\n")
        if text not in self.preamble:
            self.preamble.append(text)

    def __str__(self) -> str:
        parts = [_HEAD + f"\nGRAD, LOW = {self.grad}, {self.low}", *self.preamble, *self.classes]
        build = ["def build():", "    m = Net()", *_indented(self.setup, 4), "    return m"]
        calls = [
            "def calls():",
            "    g = torch.Generator().manual_seed(1)",
            "    def x(*shape):",
            "        return torch.randn(*shape, generator=g, dtype=torch.float64)",
            "    def ids(*shape):",
            "        return torch.randint(0, 6, shape, generator=g)",
            "    return [",
            *(f"        {call}," for call in self.calls),
            "    ]",
        ]
        change = ["def change(m):", *_indented(self.changes or ["pass"], 4)]
        parts += ["\n".join(build), "\n".join(calls), "\n".join(change)]
        return _trimmed("\n\n\n".join(parts) + "\n")


class Scope:
    """A class of the program: its ``__init__`` and ``forward``, in which ``x`` is [batch, length, width].

    Attributes:
        source: The module that it is in.
        choices: What decides.
        name: Name of the class.
        path: How the model names the instance, with a point at the end; empty for the root.
        width: Last size of ``x`` after the statements so far.
        init, body: Statements.
        members: Methods, properties and class attributes.
        arguments: Those of ``forward`` after ``self, x``.
        layers: Name of each layer that keeps the width, with that width.
        owned: Whether ``x`` may be written into without harm to what autograd keeps.
        depth: How deep the class is nested.
    """

    def __init__(self, source: Source, name: str, path: str, width: int, depth: int = 0) -> None:
        self.source, self.choices = source, source.choices
        self.name, self.path, self.width, self.depth = name, path, width, depth
        self.init: list[str] = []
        self.body: list[str] = []
        self.members: list[str] = []
        self.arguments: list[str] = []
        self.layers: list[tuple[str, int]] = []
        self.linears: list[tuple[str, int, int]] = []
        self.owned = False
        self.products = 0

    def fresh(self, stem: str) -> str:
        """A name that nothing else has."""
        return self.source.name(stem)

    def member(self, text: str) -> None:
        """Adds a method, a property or a class attribute."""
        self.members.append(textwrap.dedent(text).strip("\n"))

    def parameter(self, *shape: int, stem: str = "w") -> str:
        """A parameter of this shape; how ``forward`` names it."""
        name = self.fresh(stem)
        sizes = ", ".join(map(str, shape))
        self.init.append(f"self.{name} = nn.Parameter(torch.randn({sizes}) * 0.4)")
        return f"self.{name}"

    def layer(self, text: str, stem: str, given: int, out: int, calls: bool = True) -> str:
        """A child; how ``forward`` names it."""
        name = self.fresh(stem)
        self.init.append(f"self.{name} = {text}")
        if calls and given == out:
            self.layers.append((f"self.{name}", out))
        return f"self.{name}"

    def linear(self, out: int | None = None, bias: bool = True) -> str:
        """An ``nn.Linear`` from the present width."""
        out = self.width if out is None else out
        extra = "" if bias else ", bias=False"
        name = self.layer(f"nn.Linear({self.width}, {out}{extra})", "fc", self.width, out)
        self.linears.append((name, self.width, out))
        return name

    def statement(self) -> list[str]:
        """Something that keeps the width: a branch's body."""
        kind = self.choices.pick(["scale", "tanh", "layer", "again"])
        if kind == "layer":
            return [f"x = {self.linear()}(x)"]
        if kind == "again":
            fitting = [name for name, width in self.layers if width == self.width]
            if fitting:
                return [f"x = {self.choices.pick(fitting)}(x)"]
        return ["x = x * 1.5" if kind == "scale" else "x = torch.tanh(x)"]

    def add(self, *lines: str, owned: bool = False) -> None:
        """Adds statements to ``forward``."""
        self.body += lines
        self.owned = owned

    def __str__(self) -> str:
        arguments = ", ".join(["self", "x", *self.arguments])
        text = [f"class {self.name}(nn.Module):"]
        for member in self.members:
            text += [textwrap.indent(member, "    "), ""]
        text += ["    def __init__(self):", "        super().__init__()", *_indented(self.init, 8)]
        text += ["", f"    def forward({arguments}):", *_indented([*self.body, "return x"], 8)]
        return "\n".join(text)


def _indented(lines: list[str], width: int) -> list[str]:
    return [textwrap.indent(line, " " * width) for line in lines]


def _trimmed(text: str) -> str:
    """Without the imports that nothing uses."""
    lines = text.splitlines()
    used = {f"import {name}": f"{name}." for name in _MODULES} | {
        "import numpy as np": "np.",
        "import torch.nn.functional as F": "F.",
        "from torch.utils.checkpoint import checkpoint": "checkpoint(",
    }
    return "\n".join(line for line in lines if line not in used or used[line] in text) + "\n"
