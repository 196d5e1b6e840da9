"""Contractions chosen by their FLOPs, the idea of RunLoRA (Cherniuk et al. 2023, arXiv:2312.03415).

With W [d, k], A [r, k], B [d, r] and T tokens there are several orders of the same products:

- forward: x Wᵀ + s·(xAᵀ)Bᵀ, 2Tdk + 2Tr(d + k); or x (W + s·BA)ᵀ, 2Tdk + 2dkr;
- the gradient of x: the same choice, yW + s·(yB)A or y(W + s·BA);
- the gradients of A and B: from xAᵀ and yB, 2Tr(d + k) beyond these two; or from Z = yᵀx, 2Tdk + 4dkr.

Re-derived here; what is counted is multiplications and additions. The second form is the cheaper one from
T > dk / (d + k). It rounds W + s·BA to the weight's dtype, which in half precision loses small changes,
and there is no dropout on the branch in it: so it is for fp32 and p = 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_fx.tools.bench.linears import matrix
from lora_fx.tools.bench.peers import LowRank

__all__ = ["ChosenContraction", "Contraction", "choose"]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What is chosen.

    Attributes:
        merged_forward: Whether y = x (W + s·BA)ᵀ.
        merged_backward: Whether the gradient of x is y (W + s·BA).
        outer: Whether the factors' gradients come from Z = yᵀx.
    """

    merged_forward: bool
    merged_backward: bool
    outer: bool


def choose(tokens: int, out_features: int, in_features: int, rank: int) -> Contraction:
    """The contraction with the fewest FLOPs; of equals, the one with the branch apart."""
    options = [
        Contraction(forward, backward, outer)
        for forward in (False, True)
        for backward in (False, True)
        for outer in (False, True)
    ]
    return min(options, key=lambda one: _flops(one, tokens, out_features, in_features, rank))


def _flops(chosen: Contraction, t: int, d: int, k: int, r: int) -> int:
    """Beyond the frozen products."""
    down, up = 2 * t * k * r, 2 * t * d * r
    merged = 2 * d * k * r
    total = merged if chosen.merged_forward else down + up
    # What the merged forward builds is built again in the backward: it would be W-sized to keep.
    inner_needed = not chosen.outer or not chosen.merged_backward
    total += up * inner_needed  # yB
    total += merged if chosen.merged_backward else down
    if chosen.outer:
        return total + 2 * t * d * k + 2 * merged
    # xAᵀ is there only where the forward made it.
    return total + down + up + down * chosen.merged_forward


class ChosenContraction(LowRank):
    """A layer that chooses at each call."""

    TITLE: ClassVar[str] = "contraction by FLOPs, as in RunLoRA"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y: Tensor = _Function.apply(x, matrix(self.base), self.A, self.B, self.scale)  # type: ignore[no-untyped-call]
        bias = getattr(self.base, "bias", None)
        return y if bias is None else y + bias


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = choose(len(flat), weight.shape[0], weight.shape[1], len(a))
        down = None
        if chosen.merged_forward:
            y = flat @ torch.addmm(weight, b, a, alpha=scale).T
        else:
            down = flat @ a.T
            y = (flat @ weight.T).addmm_(down, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, down)
        ctx.scale, ctx.chosen = scale, chosen
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, down = ctx.saved_tensors
        scale, chosen = ctx.scale, ctx.chosen
        grad = grads[0].reshape(-1, len(weight))
        inner: Any = None
        if not chosen.outer or not chosen.merged_backward:
            inner = (grad @ b).mul_(scale)
        if chosen.outer:
            outer = (grad.T @ x).mul_(scale)
            grad_a, grad_b = b.T @ outer, outer @ a.T
        else:
            down = x @ a.T if down is None else down
            grad_a, grad_b = inner.T @ x, (grad.T @ down).mul_(scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if chosen.merged_backward:
                grad_x = grad @ torch.addmm(weight, b, a, alpha=scale)
            else:
                grad_x = (grad @ weight).addmm_(inner, a)
            grad_x = grad_x.view(*grads[0].shape[:-1], weight.shape[1])
        return grad_x, None, grad_a, grad_b, None
