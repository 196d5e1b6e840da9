"""Branches on whether values are finite, which no trace can take both ways.

Models that were trained in fp16 clamp what has overflowed, if anything has (BART and its kin). A graph
has no such branch. It is traced as for finite values, which are what a file is compared with PyTorch
on: where the model overflows, the export is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.export.trace.source import here

__all__ = ["FiniteValues"]

_TESTS: Mapping[Any, bool] = {
    torch.isfinite: True,
    Tensor.isfinite: True,
    torch.isinf: False,
    Tensor.isinf: False,
    torch.isnan: False,
    Tensor.isnan: False,
}
"""What each of them says of a finite number."""

_REDUCTIONS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}
"""Those of a test whose answer is that for one finite number."""


class FiniteValues(TorchFunctionMode):
    """Answers conditions of the kind ``torch.isfinite(x).all()`` in a trace: all values are finite.

    Args:
        model: What is traced.

    Attributes:
        places: Where that was answered, in order and each once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, None] = {}
        self._modules = {id(module): name for name, module in model.named_modules()}
        # By identity, and alive: another tensor must not get the id of one that is gone.
        self._tests: dict[int, tuple[Tensor, bool]] = {}
        self._answers: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Remembers tests and what they are reduced to, and answers when one is a condition."""
        if func is Tensor.__bool__ and id(args[0]) in self._answers:
            self.places.setdefault(str(here(self._modules)))
            return self._answers[id(args[0])][1]
        result = func(*args, **(kwargs or {}))
        if func in _TESTS:
            self._tests[id(result)] = result, _TESTS[func]
        elif func in _REDUCTIONS and len(args) == 1 and not kwargs and id(args[0]) in self._tests:
            found = self._tests[id(args[0])][1]
            if _REDUCTIONS[func] == found:
                self._answers[id(result)] = result, found
        return result
