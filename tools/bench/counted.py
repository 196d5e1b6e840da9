"""ATen operations of a step: the same figure on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_operations"]


def count_operations(step: Callable[[], Any]) -> int:
    """Runs a step, forward and backward, and counts what it calls below autograd.

    Views are left out: they compute nothing.
    """
    with _Counter() as counter:
        step()
    return int(counter.count)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))
