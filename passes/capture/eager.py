"""Refuses to compute with tensors while a forward is traced: the result would be a constant of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

from lora_fx.passes.capture.proxies import holds_traced

if TYPE_CHECKING:
    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["Eager"]

# What does not depend on anything that may change between a trace and a call.
_FIXED = frozenset({"shape", "size", "dim", "ndim", "numel", "nelement", "is_floating_point"})


class Eager(TorchFunctionMode):
    """A function mode that lets calls with traced values through, and no others."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if holds_traced(args) or holds_traced(kwargs):
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
