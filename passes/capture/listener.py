"""Hears the functions of PyTorch that code calls, for those who count or answer them."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["Listener"]


class Listener(TorchFunctionMode):
    """Hears every function of PyTorch that is called while it is entered, and may answer in its stead."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Give the result of a call that is not to run; NotImplemented for one that is."""
        return NotImplemented

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of a call that has run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a call, or run it and hear its result."""
        kwargs = kwargs or {}
        result = self.answer(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.hear(func, args, kwargs, result)
        return result
