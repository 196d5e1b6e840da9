"""A linear operation and its LoRA branch as one function: ``y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ``.

The branch is added in place (``addmm_``): nothing of the size tokens × features is made for it, forward or
backward, but where dropout needs a masked input. For the backward pass it keeps x, the product with A
([tokens, r]) and, under dropout, one bit for each element of x. Autograd over the plain operations keeps the
masked input and its mask instead, and makes four more passes over the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.masks import draw, kept, unpacked

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """A linear operation with a LoRA branch (Hu et al. 2021, arXiv:2106.09685).

    Under autocast it computes in autocast's dtype, otherwise in that of ``x``. Factors of another dtype are
    cast to it, and their gradients have their own. It can be differentiated twice, compiled, checkpointed and
    transformed by ``torch.func.grad``.

    Args:
        x: [..., in].
        weight: [out, in], of any strides.
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The factor s of the branch.
        dropout: Probability with which an element of the branch's input is zero; rounded as
            :func:`lora_fx.masks.kept` says.
        training: Whether there is dropout now.
        rows: Which of the outputs (start, stop) the branch is added to; None for all.

    Returns:
        [..., out].
    """
    kind = x.device.type
    # There is no autocast on the meta device, and asking for it is an error.
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    mask = None
    if dropout and training:
        mask = draw(x, dropout)
        scale *= 256 / kept(dropout)
    given = (x, weight, bias, a, b, mask, scale, rows)
    if not autocast:
        return _apply(*given)
    with torch.autocast(kind, enabled=False):
        return _apply(*given)


def _apply(*given: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return _LoraLinear.forward(*given)[0]
    apply: Any = _LoraLinear.apply
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        # The same without a look for default values at forward's signature, which takes longer than forward.
        apply = super(torch.autograd.Function, _LoraLinear).apply
    out: Tensor = apply(*given)[0]
    return out


class _LoraLinear(torch.autograd.Function):
    """Its second output is the product with A: the form that ``torch.func`` needs for what is kept."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        mask: Tensor | None,
        scale: float,
        rows: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        out = F.linear(x, weight, bias)
        masked = x if mask is None else x * unpacked(mask, x)
        down = _flat(masked) @ a.to(x.dtype).T
        _part(_flat(out), rows).addmm_(down, b.to(x.dtype).T, alpha=scale)
        # It may be a view of a matrix, and autograd forbids to write into views that a function returns;
        # models do (nn.ReLU(inplace=True)).
        return torch.ops.aten._unsafe_view.default(out, out.shape), down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, a, b, mask, scale, rows = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, a, b, mask, output[1])
        ctx.scale, ctx.rows = scale, rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, mask, down = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_a, wants_b = ctx.needs_input_grad[:5]
        # Differentiated twice, what is kept is no constant, and nothing may be written in place.
        again = torch.is_grad_enabled()
        factor = None if mask is None else _flat(unpacked(mask, x))
        grad = _flat(grads[0])
        mine, a_now, b_now = _part(grad, ctx.rows), a.to(grad.dtype), b.to(grad.dtype)
        inner = (mine @ b_now).mul(ctx.scale)
        masked = _flat(x)
        if factor is not None and (wants_a or (again and wants_b)):
            masked = masked * factor
        grad_a = (inner.T @ masked).to(a.dtype) if wants_a else None
        grad_b = None
        if wants_b:
            down = masked @ a_now.T if again else down
            grad_b = (mine.T @ down).mul(ctx.scale).to(b.dtype)
        grad_x = (
            _grad_x(grad @ weight, inner, a_now, factor, again).view(x.shape) if wants_x else None
        )
        grad_weight = grad.T @ _flat(x) if wants_weight else None
        grad_bias = grad.sum(0) if wants_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _grad_x(base: Tensor, inner: Tensor, a: Tensor, factor: Tensor | None, again: bool) -> Tensor:
    """The gradient of x from that of the base operation, which may be written into unless ``again``."""
    if factor is None:
        return torch.addmm(base, inner, a) if again else base.addmm_(inner, a)
    branch = inner @ a
    return torch.addcmul(base, branch, factor) if again else base.addcmul_(branch, factor)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _part(x: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return x if rows is None else x[:, rows[0] : rows[1]]
