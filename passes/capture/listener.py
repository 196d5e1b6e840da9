"""Mode that passes calls of PyTorch functions to methods of its subclasses, which count or replace them."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["Listener"]


class Listener(TorchFunctionMode):
    """Mode that gets every call of a PyTorch function while it is active, and may return another result."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of a call instead of running it, or NotImplemented to run it."""
        return NotImplemented

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a call that has run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the result of :meth:`answer`, or run the call and pass its result to :meth:`hear`."""
        kwargs = kwargs or {}
        result = self.answer(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.hear(func, args, kwargs, result)
        return result
