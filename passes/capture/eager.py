"""Notices, while a forward is traced, what no traced value can notice.

Tensors that are computed without a traced value would be constants of the graph; a function mode sees
them. Names that ask for global state are read off the code that traced operations come from.

What is not noticed: comparing a computed value with None or by identity. With example inputs, the
comparison of the outputs (:mod:`.check`) finds it.
"""

from __future__ import annotations

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
    return None


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
    root = module.partition(".")[0]
    return root in ("torch", "lora_fx", "numpy") or root in sys.stdlib_module_names
