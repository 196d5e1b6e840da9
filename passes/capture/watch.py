"""Watches a forward while it is traced, for what no proxy can notice.

``x is None``, ``type(x)``, ``with torch.no_grad():`` and ``global`` ask nothing of a traced value, and so
leave no trace in the graph. They are instructions, though: where code that is not of a library contains
one of them, its instructions are followed, and what they look at is looked at here first. Tensors that
are computed without a traced value are noticed by a function mode.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
import typing
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.passes.capture.proxies import ISINSTANCE, TracedValue, may_be_none

if TYPE_CHECKING:
    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["Eager", "Watch"]

_MODE = "its forward switches {} on or off, which a graph would lose"
_GLOBAL_STATE = "its forward asks PyTorch for {}, which may be another when the graph runs"
_FORBIDDEN_CALLS: dict[CodeType, str] = {
    torch.autograd.grad_mode.inference_mode.__enter__.__code__: _MODE.format("inference mode"),
    torch.amp.autocast_mode.autocast.__enter__.__code__: _MODE.format("autocast"),
    torch.random.fork_rng.__wrapped__.__code__: "its forward forks the random generator",
}
_TYPING = {
    check.__code__
    for member in vars(typing).values()
    if isinstance(member, type)
    and isinstance(check := member.__dict__.get("__instancecheck__"), FunctionType)
}
_FORBIDDEN_NAMES = {
    "is_grad_enabled": "the grad mode",
    "is_inference_mode_enabled": "the grad mode",
    "is_autocast_enabled": "autocast",
    "is_autocast_cpu_enabled": "autocast",
    "is_fx_tracing": "whether it is traced",
    "is_fx_symbolic_tracing": "whether it is traced",
    "is_compiling": "whether it is compiled",
    "is_dynamo_compiling": "whether it is compiled",
    "is_torchdynamo_compiling": "whether it is compiled",
}
_ABOUT_OBJECTS = ("type", "id", "callable", "dir", "vars")
# What does not depend on anything that may change between a trace and a call.
_FIXED = frozenset({"shape", "size", "dim", "ndim", "numel", "nelement", "is_floating_point"})


class Watch:
    """A context in which code that is not of a library is watched."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before: Any = None
        self._collects = False

    def __enter__(self) -> None:
        # Callbacks and finalizers of a collection run inside the forward, and are not part of it.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code in _FORBIDDEN_CALLS:
            self._recorder.refuse(_FORBIDDEN_CALLS[code])
        # typing.Sequence and the like look at type(x), which no value can answer for itself.
        if code in _TYPING and _has_traced(frame.f_locals.values()):
            self._recorder.refuse(ISINSTANCE)
        if _of_library(frame):
            return None
        self._recorder.seen.update(code.co_names)
        for name in _FORBIDDEN_NAMES.keys() & set(code.co_names):
            self._recorder.refuse(_GLOBAL_STATE.format(_FORBIDDEN_NAMES[name]))
        if not _instructions(code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        look = _instructions(frame.f_code).get(frame.f_lasti) if event == "opcode" else None
        reason = look(frame) if look else None
        if reason:
            self._recorder.refuse(reason)
        return self._step


class Eager(TorchFunctionMode):
    """Refuses to compute with tensors while tracing: the result would be a constant of the graph."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _has_traced(args) or _has_traced(tuple(kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name == "_set_grad_enabled":
            self._recorder.refuse(_MODE.format("gradients"))
        if name not in _FIXED:
            self._recorder.refuse(f"its forward computes without its input ({name})")
        return func(*args, **kwargs)


def _has_traced(values: Any) -> bool:
    return any(
        isinstance(v, TracedValue) or (isinstance(v, list | tuple) and _has_traced(v))
        for v in values
    )


def _of_library(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    if module.startswith("torch.nn.modules."):
        return bool(module == "torch.nn.modules.module")
    root = module.partition(".")[0]
    return root in ("torch", "lora_fx", "numpy") or root in sys.stdlib_module_names


Look = Callable[[FrameType], str | None]


@functools.lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> dict[int, Look]:
    """What to look at before which instruction."""
    found: dict[int, Look] = {}
    listed = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    for at, instruction in enumerate(listed):
        look = _look(code, listed, at)
        if look is not None:
            found[instruction.offset] = look
    return found


def _look(code: CodeType, listed: list[dis.Instruction], at: int) -> Look | None:
    name, value = listed[at].opname, listed[at].argval
    if name in ("BEFORE_WITH", "BEFORE_ASYNC_WITH") or value == "__enter__":
        return lambda _: "its forward enters a context manager, which a graph would lose"
    if name in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
        name == "STORE_DEREF" and value in code.co_freevars
    ):
        return lambda _: f"its forward writes to {value}, which is not its own"
    if name in ("STORE_ATTR", "DELETE_ATTR"):
        return functools.partial(_written, value, _operand(listed, at)[0])
    if name in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
        return lambda _: "its forward matches the structure of a value"
    if name == "LOAD_GLOBAL" and value in _ABOUT_OBJECTS:
        # The call itself has no operand that could be seen: its argument is loaded next.
        following = [i for i in listed[at + 1 : at + 3] if i.opname.startswith("LOAD")]
        return functools.partial(_identified, _loaded(following))
    if name.startswith("POP_JUMP") and name.endswith("NONE"):
        return functools.partial(_compared_to_none, _operand(listed, at)[0])
    if name != "IS_OP":
        return None
    right, start = _operand(listed, at)
    left, _ = _operand(listed, start)
    if listed[at - 1].opname == "LOAD_CONST" and listed[at - 1].argval is None:
        return functools.partial(_compared_to_none, left)
    return functools.partial(_identified, (*left, *right))


def _operand(listed: list[dis.Instruction], at: int) -> tuple[tuple[str, ...], int]:
    """What the instruction at ``at`` takes from the top of the stack.

    Returns:
        The names in the expression, with a dot before the first if it is more than that name, and
        where the expression starts. Nothing if it cannot be told.
    """
    needed, index, parts = 1, at, []
    while needed and index:
        index -= 1
        name = listed[index].opname
        if name.startswith("STORE_FAST") and listed[index - 1].opname == "COPY":
            parts.append(listed[index])
            needed -= 1
        elif name.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD")):
            parts.append(listed[index])
            needed -= 1
        elif name in ("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL"):
            needed -= 1
        elif name == "LOAD_ATTR":
            parts.append(listed[index])
        elif name in ("BINARY_SUBSCR", "BINARY_OP"):
            parts.append(listed[index])
            needed += 1
        else:
            return (), index
    names = _loaded(reversed(parts))
    modes = ("training",) if any(i.argval == "training" for i in parts) else ()
    return ("", *names, *modes) if len(parts) > 1 else names, index


def _loaded(instructions: Iterable[dis.Instruction]) -> tuple[str, ...]:
    found: list[str] = []
    for instruction in instructions:
        if "_FAST" in instruction.opname or instruction.opname == "LOAD_DEREF":
            names = instruction.argval
            found.append(names[-1] if isinstance(names, tuple) else names)
    return tuple(found)


def _written(attribute: str, names: tuple[str, ...], frame: FrameType) -> str | None:
    # What is written and written back, State cannot see; a child that is called between would.
    if any(isinstance(frame.f_locals.get(name), nn.Module) for name in names):
        return f"its forward writes to an attribute of a module ({attribute})"
    return None


def _compared_to_none(names: tuple[str, ...], frame: FrameType) -> str | None:
    for name in names:
        value = frame.f_locals.get(name)
        if isinstance(value, TracedValue) and (names[0] == "" or may_be_none(value)):
            return f"its forward asks whether {name}, or a part of it, is None"
    return None


def _identified(names: tuple[str, ...], frame: FrameType) -> str | None:
    for name in names:
        if name == "training" or isinstance(frame.f_locals.get(name), TracedValue):
            return f"its forward asks for the type or the identity of {name}, a traced value"
    return None
