"""Notices, while a forward is traced, what no traced value can notice.

Tensors that are computed without a traced value would be constants of the graph; a function mode sees
them. The rest is read off the code that traced operations come from: names that ask for global state,
and instructions that ask nothing of a value (``x is y``, ``type(x)``, ``with``, ``global``). That is
done without running anything, so that it is sometimes refused in vain: a graph less, nothing worse.

What is not noticed: comparing the result of a call with None where it is not taken apart. With example
inputs, the comparison of the outputs (:mod:`.check`) finds it.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from lora_fx.passes.capture.proxies import TracedValue

if TYPE_CHECKING:
    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["Eager", "forbidden", "user_code"]

_GLOBAL_STATE = "its forward asks PyTorch for {}, which may be another when the graph runs"
_FORBIDDEN_NAMES = {
    "autocast": "autocast",
    "decorate_autocast": "autocast",
    "maybe_autocast": "autocast",
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
_WRITTEN_OUT = (
    "lora_fx.passes.capture.written_out",
    "lora_fx.passes.capture.written_out_torchvision",
)
_ABOUT_OBJECTS = ("type", "id", "callable", "vars", "dir")
# What does not depend on anything that may change between a trace and a call.
_FIXED = frozenset({"shape", "size", "dim", "ndim", "numel", "nelement", "is_floating_point"})


def user_code(frame: FrameType | None, until: CodeType, known: set[CodeType]) -> None:
    """Adds the code on the stack, up to ``until``, that belongs to no library to ``known``."""
    while frame is not None and frame.f_code is not until:
        if not _of_library(frame) or frame.f_code.co_name == "decorate_autocast":
            known.add(frame.f_code)
        frame = frame.f_back


def forbidden(codes: set[CodeType]) -> str | None:
    """Why this code may do something else when the graph runs, or None."""
    for code in codes:
        for name in sorted(_FORBIDDEN_NAMES.keys() & {code.co_name, *code.co_names}):
            return _GLOBAL_STATE.format(_FORBIDDEN_NAMES[name])
        if code.co_name != "decorate_autocast":
            reason = _instructions(code)
            if reason:
                return f"its forward {reason}"
    return None


@functools.lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> str | None:
    """The first instruction that a graph may not stand for, in words."""
    listed = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    unpacked = _unpacked(listed)
    own = code.co_varnames[:1]
    for at, instruction in enumerate(listed):
        name, value = instruction.opname, instruction.argval
        before = listed[at - 1] if at else instruction
        if name == "BEFORE_WITH" or (name == "LOAD_SPECIAL" and "__enter__" in str(value)):
            return "enters a context manager, which a graph would lose"
        if name == "STORE_GLOBAL" or (name == "STORE_DEREF" and value in code.co_freevars):
            return f"writes to {value}, which is not its own"
        if name in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
            return "matches the structure of a value"
        if name == "STORE_ATTR" and _root(listed, at) in own:
            return f"writes to an attribute of a module ({value})"
        if name == "LOAD_GLOBAL" and value in _ABOUT_OBJECTS:
            about = _local(listed[at + 1])
            if about and about not in own:
                return f"asks for the type or the identity of {about}"
        if name == "IS_OP" and _local(before):
            return f"asks for the type or the identity of {_local(before)}"
        to_none = before.opname == "LOAD_CONST" and before.argval is None and name == "IS_OP"
        if to_none or (name.startswith("POP_JUMP") and name.endswith("NONE")):
            asked = listed[at - 2] if to_none else before
            part = asked.opname == "BINARY_SUBSCR" and _root(listed, at - to_none) not in own
            if part or _local(asked) in unpacked:
                return "asks whether a part of a value is None"
    return None


def _local(instruction: dis.Instruction) -> str:
    """The local that is loaded (the last one, where there are two), or nothing."""
    if "LOAD_FAST" not in instruction.opname and instruction.opname != "LOAD_DEREF":
        return ""
    value = instruction.argval
    return str(value[-1] if isinstance(value, tuple) else value)


def _root(listed: list[dis.Instruction], at: int) -> str:
    """The local at the start of the attributes and items that the instruction works on."""
    for instruction in reversed(listed[:at]):
        if instruction.opname not in ("LOAD_ATTR", "BINARY_SUBSCR", "LOAD_CONST"):
            return _local(instruction)
    return ""


def _unpacked(listed: list[dis.Instruction]) -> frozenset[str]:
    """Locals that get one of several results of a call."""
    found: set[str] = set()
    for at, instruction in enumerate(listed):
        if instruction.opname == "UNPACK_SEQUENCE" and listed[at - 1].opname.startswith("CALL"):
            for store in listed[at + 1 : at + 1 + int(instruction.argval)]:
                names = store.argval if store.opname.startswith("STORE_FAST") else ()
                found.update(names if isinstance(names, tuple) else (names,))
    return frozenset(found)


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
            self._recorder.refuse(
                "its forward switches gradients on or off, which a graph would lose"
            )
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
    if module in _WRITTEN_OUT:
        return False  # it stands for code of the user's, and names the same attributes
    root = module.partition(".")[0]
    return root in ("torch", "lora_fx", "numpy") or root in sys.stdlib_module_names
