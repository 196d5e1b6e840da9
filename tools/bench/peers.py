"""Adapters as others write them, without their libraries: plain operations that autograd differentiates."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.tools.bench.linears import matrix

__all__ = ["FiveOperations", "InPlace", "LowRank", "WeightChange"]


class LowRank(nn.Module):
    """A frozen linear layer with factors A [r, in] and B [out, r] in the dtype of its weight.

    Attributes:
        TITLE: What the benchmark calls it.
    """

    TITLE: ClassVar[str]

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        weight = matrix(base)
        self.base = base
        self.A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the branch."""
        if not self.dropout:
            return x
        return F.dropout(x, self.dropout, self.training)


class FiveOperations(LowRank):
    """Dropout, A, B, scale, add, each an operation of its own, as torchtune's ``LoRALinear`` does."""

    TITLE = "five operations, as in torchtune"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        branch = F.linear(F.linear(self.dropped(x), self.A), self.B)
        y: Tensor = self.base(x)
        return y + self.scale * branch


class InPlace(LowRank):
    """The branch as two products that are added in place, as loralib's ``Linear`` does."""

    TITLE = "added in place, as in loralib"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y: Tensor = self.base(x)
        y += (self.dropped(x) @ self.A.T @ self.B.T) * self.scale
        return y


class WeightChange(LowRank):
    """ΔW = s·BA is built at every step: what one writes first, or with a parametrization of the weight."""

    TITLE = "naive: builds ΔW"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        change = self.scale * (self.B @ self.A)
        if not (self.dropout and self.training):
            bias = getattr(self.base, "bias", None)
            return F.linear(x, matrix(self.base) + change, bias)
        y: Tensor = self.base(x)
        return y + F.linear(self.dropped(x), change)
