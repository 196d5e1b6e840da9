"""Where in the user's code something happens: the operation, the module and the line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

__all__ = ["Place", "fault_of", "here", "inner_module", "op_name", "place_of", "user_line"]

# Lines in here are no lines of the user's; "<" begins the names of generated code.
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
# Where the call of the model begins: what lies further out is the caller of the export.
_ENTRY = str(Path(__file__).with_name("arguments.py"))
_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in ')


@dataclass(frozen=True)
class Place:
    """A place in a model.

    Attributes:
        op: The operation ("aten.conv2d"), "" for plain Python.
        module: FQN of the module that it is in, "" for the root.
        line: File and line of the user's code, "" if there is none.
    """

    op: str = ""
    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        module = f"in '{self.module}'" if self.module else ""
        line = f"({self.line})" if self.line else ""
        return " ".join(filter(None, (self.op or "a condition", module, line)))


def place_of(node: fx.Node, prefix: str) -> Place:
    """Where a node of an exported program comes from.

    Args:
        node: The node.
        prefix: What the FQNs of its modules have in front.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    modules = [str(entry[0]) for entry in stack]
    line = user_line(node.meta.get("stack_trace") or "")
    return Place(op_name(node.target), inner_module(modules, prefix), line)


def user_line(stack: str) -> str:
    """The innermost line of a stack trace that is the user's: ``nets.py:12``, or ""."""
    frames = _FRAME.findall(stack)
    lines = [
        f"{Path(file).name}:{line}" for file, line in frames if not file.startswith(_NOT_THEIRS)
    ]
    return lines[-1] if lines else ""


def inner_module(names: list[str], prefix: str) -> str:
    """The innermost of the modules in ``names``, without the prefix of all of them."""
    root = prefix.removesuffix(".")
    inner = [name for name in names if name and name != root]
    return inner[-1].removeprefix(prefix) if inner else ""


def here(modules: Mapping[int, str]) -> Place:
    """Where the model is that is being traced, read off the stack of this thread.

    Args:
        modules: ``id`` of every module to its FQN.
    """
    op, line, module = "", "", None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (module is None or not line):
        values, file = frame.f_locals, frame.f_code.co_filename
        if module is None and frame.f_code.co_name == "__torch_dispatch__":
            # The outermost is what the model called; what that is made of lies further in.
            op = op_name(values.get("func"))
        if module is None:
            module = modules.get(id(values.get("self")))
        if not line and not file.startswith(_NOT_THEIRS):
            line = f"{Path(file).name}:{frame.f_lineno}"
        if file == _ENTRY:
            break
        frame = frame.f_back
    return Place(op, module or "", line)


def fault_of(error: BaseException, modules: Mapping[int, str]) -> Place:
    """Where in the model an error was raised, read off its traceback.

    Args:
        error: What the caller has caught around the call of the model.
        modules: ``id`` of every module to its FQN.
    """
    line, module = "", ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if not frame.f_code.co_filename.startswith(_NOT_THEIRS):
            line = f"{Path(frame.f_code.co_filename).name}:{trace.tb_lineno}"
        module = modules.get(id(frame.f_locals.get("self")), module)
        trace = trace.tb_next
    return Place(module=module, line=line)


def op_name(target: Any) -> str:
    """``aten.add`` for ``aten.add.Tensor``, and a name for everything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return str(getattr(target, "__name__", target or ""))
