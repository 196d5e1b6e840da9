"""A linear operation and its DoRA branch as one function: ``y = g ∘ (x Wᵀ + s · (drop(x) Aᵀ) Bᵀ) + bias``.

The gain and the branch are applied to the output in place. The backward needs the same saved tensors as in
:mod:`lora_fx.runtime.kernels.fused_lora`, and the gain ([out]): x (or the inputs that x is recomputed from),
the product with A ([tokens, r]) and, with dropout, a bit for each element of x.

The gradient of the gain is a sum over ``y - bias``, which is not saved, as in
:mod:`lora_fx.runtime.kernels.dora`. Either the product is recomputed, or the output is divided by the gain.
For the latter a lazy copy of the output is saved, which no caller can write into. Often the next layer saves
the output anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import LoraFxError
from lora_fx.runtime.kernels.dora import divisible, times_gains
from lora_fx.runtime.kernels.fused_lora import (
    add_product,
    apply,
    autocast_dtype,
    cast,
    dropped_outer,
    dropped_product,
    flat,
    without_autocast,
    writable,
)
from lora_fx.runtime.kernels.masks import draw, masked, recovery, seed_of, unpacked
from lora_fx.runtime.kernels.recompute import Source, lazy_copy, source_of

__all__ = ["dora_linear"]

_Rows = tuple[int, int]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    gains: Tensor,
    again: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    rows: _Rows | None = None,
) -> Tensor:
    """Compute a linear operation with a weight-decomposed branch (DoRA, Liu et al. 2024, arXiv:2402.09353).

    Dtypes, autocast and the transforms of ``torch.func`` work as in
    :func:`lora_fx.runtime.kernels.fused_lora.lora_linear`. A compiler sees plain operations, and decides
    which tensors to save. Dropout is applied to the branch only. x is saved only for the gradients of A and
    W, and for that of the gain if the product is recomputed.

    Args:
        x: [..., in].
        weight: [out, in], of any strides.
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The scale s of the branch.
        gains: g of :func:`lora_fx.runtime.kernels.dora.gain`, [n], in fp32, or fp64 for an fp64 weight.
        again: True to recompute ``x Wᵀ`` for the gradient of g, which costs a product and no memory.
            Otherwise the gradient is computed from the output, which is saved. ``x Wᵀ`` is recomputed anyway
            if a gain is near 0, if the values of the gains cannot be read, or if only some ``rows`` have the
            branch.
        dropout: Dropout probability of the branch's input, rounded as in
            :func:`lora_fx.runtime.kernels.masks.kept`.
        training: True if dropout is active.
        rows: The outputs (start, stop) that have the branch and the gain, or None for all.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass, if it needs x and x was not saved.
    """
    if x.is_nested:
        masked = F.dropout(x, dropout) if dropout and training else x
        return _nested(x, masked, weight, bias, a, b, _Options(scale, rows, True), gains)
    kind, source = x.device.type, source_of(x)
    dtype = autocast_dtype(kind)
    if dtype is not None:
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    mask = None
    if dropout and training:
        mask = draw(x, dropout)
        scale = scale * recovery(dropout)
    options = _Options(scale, rows, again or rows is not None)
    args = (x, mask, options, source, weight, bias, a, b, gains)
    with without_autocast(kind):
        if torch.compiler.is_compiling():
            return _plain(*args)[0]
        return apply(_DoraLinear, _plain, args)[0]


class _Options(NamedTuple):
    """Options of one call of :func:`dora_linear`. With ``again``, the backward recomputes ``x Wᵀ``."""

    scale: float
    rows: _Rows | None
    again: bool

    def part(self, matrix: Tensor) -> Tensor:
        """Return the columns of an output matrix to which the branch is added."""
        return matrix if self.rows is None else matrix[:, self.rows[0] : self.rows[1]]

    def own(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight, or the elements of a bias, for the outputs that have the branch."""
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    def scaled_b(self, b: Tensor, gains: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``s · g ∘ B``. Scaling B costs less than scaling the output of the branch."""
        return (b * (gains * self.scale)[:, None]).to(dtype)


def _plain(
    x: Tensor,
    mask: Tensor | None,
    options: _Options,
    source: Source | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gains: Tensor,
) -> tuple[Tensor, ...]:
    own = x if mask is None else masked(x, mask)
    base = F.linear(x, weight, bias)
    part = base if options.rows is None else base[..., options.rows[0] : options.rows[1]]
    up = F.linear(F.linear(own, a.to(x.dtype)), options.scaled_b(b, gains, x.dtype))
    if bias is not None:
        up = up + ((1 - gains) * options.own(bias)).to(x.dtype)
    change = torch.addcmul(up, part, (gains - 1).to(x.dtype))
    if options.rows is not None:
        change = F.pad(change, (options.rows[0], weight.shape[0] - options.rows[1]))
    return (base + change,)


def _nested(
    x: Tensor,
    masked: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    options: _Options,
    gains: Tensor,
) -> Tensor:
    """Compute :func:`dora_linear` for ``torch.nested`` tensors, which support little but products and sums.

    Gains scale the rows of the weights instead of the outputs, because the rows are few compared with the
    tokens.
    """
    out = F.linear(x, weight, bias)
    turned = options.scaled_b(b, gains, out.dtype)
    change = (options.own(weight) * (gains - 1)[:, None]).to(weight.dtype)
    if options.rows is not None:
        padding = (0, 0, options.rows[0], weight.shape[0] - options.rows[1])
        turned, change = F.pad(turned, padding), F.pad(change, padding)
    up = F.linear(F.linear(masked, a.to(out.dtype)), turned)
    return out + (F.linear(x, change) + up)


class _DoraLinear(torch.autograd.Function):
    """Autograd function of :func:`dora_linear`.

    It also returns the product with A, because a backward can save only inputs and outputs.
    """

    @staticmethod
    def forward(
        x: Tensor,
        mask: Tensor | None,
        options: _Options,
        source: Source | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gains: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # First the operation itself: if x has a wrong shape, the error is that of the layer.
        out = writable(F.linear(x, weight, bias))
        down = dropped_product(x, mask, a.to(x.dtype))
        mine = options.part(flat(out))
        # The product includes the bias, because only then gains of 1 leave every bit as it is.
        _scale(mine, gains)
        if bias is not None:
            mine.add_(((1 - gains) * options.own(bias)).to(x.dtype))
        mine.addmm_(down, options.scaled_b(b, gains, x.dtype).T)
        # As in lora_fx.runtime.kernels.fused_lora: callers cannot write in place into a view that a function
        # returns.
        return torch_private.UNSAFE_VIEW(out, out.shape), down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, mask, options, source, weight, bias, a, b, gains = inputs
        out, down = output
        ctx.mark_non_differentiable(down)
        ctx.set_materialize_grads(False)
        wants = _Wants(*ctx.needs_input_grad)
        again = wants.gains and (options.again or not divisible(gains))
        divides = wants.gains and not again
        keep = wants.a or wants.weight or again
        # If x is recomputed, save the inputs that it is recomputed from: they are saved anyway.
        made_of = source.saved if keep and source is not None else ()
        ctx.source = source.kept() if made_of else None
        ctx.save_for_backward(
            x if keep and not made_of else None,
            mask if wants.x or wants.a or wants.gains else None,
            down if wants.b or again else None,
            lazy_copy(out) if divides else None,
            weight,
            bias if divides else None,
            a,
            b,
            gains,
            *made_of,
        )
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(grad.device.type):
            results = _gradients(ctx, grad)
        if ctx.source is not None:
            ctx.source.done()
        return results


class _Wants(NamedTuple):
    """Flags that say which arguments of :class:`_DoraLinear` require a gradient."""

    x: bool
    mask: bool
    options: bool
    source: bool
    weight: bool
    bias: bool
    a: bool
    b: bool
    gains: bool


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of every argument of :class:`_DoraLinear`."""
    x, mask, down, out, weight, bias, a, b, gains, *made_of = ctx.saved_tensors
    options, wants = ctx.options, _Wants(*ctx.needs_input_grad)
    # In a double backward the saved tensors are not constants, and nothing may be written in place.
    again = torch.is_grad_enabled()
    x = _input(ctx, x, made_of)
    grad = flat(grad_out)
    part = options.part(grad)
    down_weight = a.to(grad.dtype)
    seed = None if again else seed_of(mask, down_weight)
    factor = None
    if mask is not None and seed is None:
        like = grad.new_empty(()).expand(ctx.shape) if x is None else x
        factor = flat(unpacked(mask, like))
    divides = out is not None and not again
    wants_down = wants.b or (wants.gains and not divides)
    masked = crossed = None
    lacks = wants_down and (down is None or (again and wants.x))
    if seed is None and (wants.a or lacks):
        masked = flat(_known(x)) if factor is None else flat(_known(x)) * factor
        down = masked @ down_weight.T if again else down
    grad_x = grad_weight = grad_a = grad_b = grad_gains = None
    if wants_down:
        crossed = (part.T @ down).to(gains.dtype) * options.scale
    if wants.b:
        grad_b = (crossed * gains[:, None]).to(b.dtype)
    product = None
    if wants.gains and divides:
        product = flat(out) * part if bias is None else (flat(out) - bias).mul_(part)
        grad_gains = product.sum(0, dtype=gains.dtype) / gains
    elif wants.gains:
        base = flat(_known(x)) @ options.own(weight).T
        product = base * part if again else base.mul_(part)
        grad_gains = product.sum(0, dtype=gains.dtype) + (crossed * b).sum(1)
    if wants.a or wants.x:
        inner = part @ options.scaled_b(b, gains, grad.dtype)
        if wants.a:
            grad_a = dropped_outer(inner, x, masked, seed).to(a.dtype)
    if wants.x or wants.weight:
        # Reuse the memory of the product: on a CPU an allocation costs more than the computation.
        scaled = _times_gain(grad, gains, options, None if again else product)
        if wants.weight:
            grad_weight = scaled.T @ flat(_known(x))
        if wants.x:
            grad_x = scaled @ weight
            grad_x = add_product(grad_x, inner, down_weight, again, factor, seed).view(ctx.shape)
    grad_bias = grad.sum(0) if wants.bias else None
    return grad_x, None, None, None, grad_weight, grad_bias, grad_a, grad_b, grad_gains


def _input(ctx: Any, x: Tensor | None, made_of: list[Tensor]) -> Tensor | None:
    """Return the input x in the backward: the saved tensor, or x computed again from ``made_of``.

    Return None if no gradient needs x.
    """
    if ctx.source is None:
        return x
    value: Tensor = ctx.source.value(made_of, torch.is_grad_enabled()).to(ctx.dtype)
    return value


def _known(x: Tensor | None) -> Tensor:
    if x is None:
        raise LoraFxError(
            "the gradient of DoRA with a frozen A cannot be differentiated again (create_graph=True), since "
            "its input is not kept: make A trainable, or rewrite with optimize=False"
        )
    return x


def _scale(matrix: Tensor, gains: Tensor) -> None:
    """Compute ``g ∘ matrix`` in place."""
    if gains.dtype == matrix.dtype:
        matrix.mul_(gains)
    else:
        # A gain near 1 would lose its digits in a half type, but its difference from 1 does not.
        matrix.addcmul_(matrix, (gains - 1).to(matrix.dtype))


def _times_gain(grad: Tensor, gains: Tensor, options: _Options, space: Tensor | None) -> Tensor:
    """Return the gradient of the output before it is multiplied by the gain: ``g ∘ grad``.

    Args:
        grad: The gradient of the output.
        gains: g.
        options: The options, with the outputs that have a gain.
        space: A tensor that the result may overwrite, or None. It is used only if it has the same size.
    """
    if options.rows is None:
        return times_gains(grad, gains, space)
    change = F.pad(gains - 1, (options.rows[0], grad.shape[1] - options.rows[1]))
    return torch.addcmul(grad, grad, change.to(grad.dtype))
