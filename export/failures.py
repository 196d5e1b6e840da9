"""Reasons why ``torch.export`` refused a model, in terms of inputs, axes, modules and source lines."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from lora_fx import torch_private
from lora_fx.passes.capture import Listener

__all__ = [
    "SizeRecord",
    "SourceLocation",
    "headline",
    "here",
    "inner_module",
    "join_failures",
    "place_of",
    "reason_of_failure",
    "record_sizes",
    "user_line",
]


# Code in these paths is not the user's. "<" begins the names of generated code.
_NOT_THEIRS = (
    *(str(Path(torch.__file__).parent), str(Path(__file__).parent)),
    *(inspect.getfile(Listener), "<"),
)
# File in which the call of the model begins. Frames further out are the caller of the export.
_ENTRY = str(Path(__file__).with_name("arguments.py"))
_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in ')


@dataclass(frozen=True)
class SourceLocation:
    """Source location in a model.

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


def place_of(node: fx.Node, prefix: str) -> SourceLocation:
    """Return the source location of a node of an exported program.

    Args:
        node: The node.
        prefix: Prefix of the FQNs of its modules.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    modules = [str(entry[0]) for entry in stack]
    line = user_line(node.meta.get("stack_trace") or "")
    return SourceLocation(_op_name(node.target), inner_module(modules, prefix), line)


def user_line(stack: str) -> str:
    """Return the innermost line of user code in a stack trace, such as ``nets.py:12``, or ""."""
    frames = _FRAME.findall(stack)
    lines = [
        f"{Path(file).name}:{line}" for file, line in frames if not file.startswith(_NOT_THEIRS)
    ]
    return lines[-1] if lines else ""


def inner_module(names: list[str], prefix: str) -> str:
    """Return the last FQN of ``names``, the innermost module, without ``prefix``; "" for the root."""
    root = prefix.removesuffix(".")
    inner = [name for name in names if name and name != root]
    return inner[-1].removeprefix(prefix) if inner else ""


def here(modules: Mapping[int, str]) -> SourceLocation:
    """Return the current source location in a traced model, from the stack of this thread.

    Args:
        modules: FQNs of all modules by ``id``.
    """
    op, line, module = "", "", None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (module is None or not line):
        values, file = frame.f_locals, frame.f_code.co_filename
        if module is None and frame.f_code.co_name == "__torch_dispatch__":
            # The last assignment wins: the outermost operation is the one that the model called.
            op = _op_name(values.get("func"))
        if module is None:
            module = modules.get(id(values.get("self")))
        if not line and not file.startswith(_NOT_THEIRS):
            line = f"{Path(file).name}:{frame.f_lineno}"
        if file == _ENTRY:
            break
        frame = frame.f_back
    return SourceLocation(op, module or "", line)


def _op_name(target: Any) -> str:
    """Return the name of an operation without its overload: ``aten.add`` for ``aten.add.Tensor``."""
    if isinstance(target, torch_private.OpOverload):
        return str(target.overloadpacket)
    return str(getattr(target, "__name__", target or ""))


class SizeRecord:
    """Record of the locations in a model where torch.export fixed the size of an axis during a trace."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._places: dict[str, SourceLocation] = {}
        self._equal: dict[str, str] = {}
        self._symbols: dict[str, str] = {}

    def place(self, dim: Any) -> SourceLocation | None:
        """Return the location where an axis became a number; None if it is unknown.

        Args:
            dim: Size of the axis in the shape of a traced input.
        """
        return self._found(str(getattr(getattr(dim, "node", None), "_expr", "")))

    def place_of(self, source: str) -> SourceLocation | None:
        """Return the location where an axis became a number, by torch.export's name of the axis."""
        return self._found(self._symbols.get(source, ""))

    def fault(self, error: BaseException) -> SourceLocation:
        """Return the location in the model where an error was raised, from its traceback."""
        line, module = "", ""
        trace = error.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if not frame.f_code.co_filename.startswith(_NOT_THEIRS):
                line = f"{Path(frame.f_code.co_filename).name}:{trace.tb_lineno}"
            module = self._modules.get(id(frame.f_locals.get("self")), module)
            trace = trace.tb_next
        return SourceLocation(module=module, line=line)

    def _found(self, symbol: str) -> SourceLocation | None:
        seen: set[str] = set()
        while symbol not in self._places and symbol in self._equal and symbol not in seen:
            seen.add(symbol)
            symbol = self._equal[symbol]
        return self._places.get(symbol)

    def note(self, symbol: object, value: Any, sources: Iterable[Any] = ()) -> None:
        """Record that the size symbol of the axes ``sources`` became a number or another symbol."""
        self._symbols.update((source.name, str(symbol)) for source in sources)
        if getattr(value, "is_Integer", False):
            self._places.setdefault(str(symbol), here(self._modules))
        elif getattr(value, "is_Symbol", False):
            self._equal.setdefault(str(symbol), str(value))


@contextmanager
def record_sizes(model: nn.Module) -> Iterator[SizeRecord]:
    """Record where torch.export fixes sizes of axes, in traces that begin inside the block."""
    sizes = SizeRecord(model)
    original = getattr(ShapeEnv, torch_private.REPLACEMENT_METHOD)

    def replace(env: ShapeEnv, symbol: Any, value: Any, message: str) -> None:
        sizes.note(symbol, value, env.var_to_sources.get(symbol, ()))
        original(env, symbol, value, message)

    setattr(ShapeEnv, torch_private.REPLACEMENT_METHOD, replace)
    try:
        yield sizes
    finally:
        setattr(ShapeEnv, torch_private.REPLACEMENT_METHOD, original)


# torch.export's name of an axis of a ``FlatModel``, whose only argument is a tuple.
_AXIS = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def headline(error: Exception) -> str:
    """Return the first line of the message of an error, cut to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def reason_of_failure(
    error: Exception, sizes: SizeRecord, names: Sequence[str], tensors: Sequence[Tensor]
) -> str:
    """Return the reason why a trace failed.

    Args:
        error: The error that torch.export raised.
        sizes: Record of the sizes in that trace.
        names: Names of the inputs.
        tensors: The inputs of the call that was traced.
    """
    location = sizes.fault(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            f"{location} is data-dependent: a graph cannot branch on values. Write both sides and choose "
            "with torch.where, or capture a model without that branch"
        )
    if "Constraints violated" in str(error):
        axes = dict.fromkeys((int(i), int(axis)) for i, axis in _AXIS.findall(str(error)))
        fixed = [_fixed(i, axis, sizes, names, tensors) for i, axis in axes if i < len(names)]
        if fixed:
            return "; ".join(fixed)
    return f"{headline(error)}, at {location}" if location.line else headline(error)


def _fixed(
    index: int, axis: int, sizes: SizeRecord, names: Sequence[str], tensors: Sequence[Tensor]
) -> str:
    location = sizes.place_of(f"L['tensors'][{index}].size()[{axis}]")
    because = "" if location is None else f": {location}"
    size = tensors[index].shape[axis]
    return (
        f"axis {axis} of '{names[index]}' is fixed, the model works with size {size} only{because}"
    )


def join_failures(failures: Iterable[str]) -> str:
    """Join failures of the form ``attempt: reason`` into one text, in which each reason occurs once."""
    ways: dict[str, list[str]] = {}
    for failure in failures:
        way, _, reason = failure.partition(": ")
        ways.setdefault(reason, []).append(way)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in ways.items())
