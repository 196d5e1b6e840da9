"""A linear operation and its LoRA branch as one function: ``y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ``.

The branch is added in place (``addmm_``): nothing of the size tokens × features is made for it, forward or
backward, but where dropout needs a masked input. For the backward pass it keeps x, the product with A
([tokens, r]) and, under dropout, one bit for each element of x. Autograd over the plain operations keeps the
masked input and its mask instead, and makes four more passes over the output.

Operations that share x have one product with all their A's, forward and backward, and one gradient of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx._fused_calls import (
    add_product,
    apply,
    autocast_dtype,
    cast,
    flat,
    without_autocast,
)
from lora_fx.errors import LoraFxError
from lora_fx.masks import draw, kept, unpacked

__all__ = ["lora_linear", "lora_linears"]

_Rows = tuple[int, int]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
    rows: _Rows | None = None,
) -> Tensor:
    """A linear operation with a LoRA branch (Hu et al. 2021, arXiv:2106.09685).

    Under autocast it computes in autocast's dtype (fp64 stays fp64, as in PyTorch), otherwise in that of
    ``x``. Factors of another dtype are cast to it, and so their gradients are computed in it, with its digits
    and its range: fp16 without autocast needs a gradient scaler, as a model in fp16 does. It can be
    differentiated twice, compiled and checkpointed. Under the transforms of ``torch.func``, and for nested
    tensors, it runs as the plain operations. Forward-mode differentiation outside of ``torch.func`` is an
    error. Where A is frozen x is not kept.

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

    Raises:
        LoraFxError: In a second backward pass, where A is frozen and both x and B want a gradient.
    """
    options = ((scale, rows),)
    return _applied(x, dropout if training else 0.0, options, (weight, bias, a, b))[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[_Rows | None],
) -> tuple[Tensor, ...]:
    """Several of :func:`lora_linear` over one x, without dropout.

    Ranks and numbers of outputs may differ.

    Args:
        x: [..., in].
        weights: [out, in], of each operation, as the others.
        biases: [out], or None.
        a: A, [r, in].
        b: B, [n, r].
        scales: The factor of the branch.
        rows: Which of the outputs it is added to, or None.

    Returns:
        The output of each, [..., out].

    Raises:
        LoraFxError: As :func:`lora_linear`.
    """
    each = zip(weights, biases, a, b, strict=True)
    tensors = [tensor for of_one in each for tensor in of_one]
    return _applied(x, 0.0, tuple(zip(scales, rows, strict=True)), tensors)


def _applied(
    x: Tensor,
    dropout: float,
    options: tuple[tuple[float, _Rows | None], ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    if x.is_nested:
        return _nested(x, dropout, options, tensors)
    kind = x.device.type
    dtype = autocast_dtype(kind)
    if dtype is not None:
        x = cast(x, dtype)
        # Weights and biases; factors are cast inside, so that they are saved as they are.
        tensors = [
            cast(one, dtype) if one is not None and place % 4 < 2 else one
            for place, one in enumerate(tensors)
        ]
    mask = None
    if dropout:
        mask = draw(x, dropout)
        options = tuple((scale * 256 / kept(dropout), rows) for scale, rows in options)
    with without_autocast(kind):
        return apply(_LoraLinears, _plain, (x, mask, options, *tensors))


def _nested(
    x: Tensor, dropout: float, options: Any, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """For sequences of several lengths (``torch.nested``), which have few operations, and no mask of bits."""
    masked = F.dropout(x, dropout) if dropout else x
    return _one_by_one(x, masked, options, tensors)


class _Operation(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    rows: _Rows | None

    def part(self, x: Tensor) -> Tensor:
        """The outputs that the branch is added to."""
        return x if self.rows is None else x[:, self.rows[0] : self.rows[1]]


def _operations(options: Any, tensors: Sequence[Any]) -> list[_Operation]:
    return [
        _Operation(*tensors[4 * place : 4 * place + 4], *option)
        for place, option in enumerate(options)
    ]


def _plain(
    x: Tensor, mask: Tensor | None, options: Any, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    masked = x if mask is None else x * unpacked(mask, x)
    return _one_by_one(x, masked, options, tensors)


def _one_by_one(
    x: Tensor, masked: Tensor, options: Any, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    outputs = []
    for one in _operations(options, tensors):
        branch = F.linear(F.linear(masked, one.a.to(x.dtype)), one.b.to(x.dtype)) * one.scale
        if one.rows is not None:
            branch = F.pad(branch, (one.rows[0], one.weight.shape[0] - one.rows[1]))
        outputs.append(F.linear(x, one.weight, one.bias) + branch)
    return tuple(outputs)


class _LoraLinears(torch.autograd.Function):
    """Its last output is the product with the A's: what is kept for the backward has to be an output."""

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, options: Any, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        operations = _operations(options, tensors)
        masked = x if mask is None else x * unpacked(mask, x)
        down = flat(masked) @ _joined(operations, x.dtype).T
        outputs = []
        for one, its_down in _with_columns(operations, down):
            out = F.linear(x, one.weight, one.bias)
            one.part(flat(out)).addmm_(its_down, one.b.to(x.dtype).T, alpha=one.scale)
            # It may be a view of a matrix, and autograd forbids to write into views that a function returns;
            # models do (nn.ReLU(inplace=True)).
            outputs.append(torch.ops.aten._unsafe_view.default(out, out.shape))
        return *outputs, down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, options, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        wants = ctx.needs_input_grad[3:]
        wants_a = any(wants[2::4])
        # A frozen A (LoRA-FA, arXiv:2308.03303) is there to save x. A compiler sees by itself what is read.
        keep = wants_a or any(wants[::4]) or torch.compiler.is_compiling()
        mask = mask if ctx.needs_input_grad[0] or wants_a else None
        down = output[-1] if any(wants[3::4]) else None
        ctx.save_for_backward(x if keep else None, mask, down, *tensors)
        ctx.options, ctx.shape = options, x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(known.device.type):
            return _gradients(ctx, *grads)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of every argument of forward, from those of its outputs, some of which may be None."""
    x, mask, down, *tensors = ctx.saved_tensors
    operations = _operations(ctx.options, tensors)
    wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
    wants_a = any(wants[2::4])
    known = next(grad for grad in grads if grad is not None)
    # Differentiated twice, what is kept is no constant, and nothing may be written in place.
    again = torch.is_grad_enabled()
    like = known.new_empty(()).expand(ctx.shape) if x is None else x
    factor = None if mask is None else flat(unpacked(mask, like))
    joined = _joined(operations, known.dtype)
    masked = None
    if wants_a or (again and any(wants[3::4]) and wants_x):
        masked = _masked(x, factor)
        down = masked @ joined.T if again else down
    results: list[Tensor | None] = [None] * len(wants)
    inner, grad_x = [], None
    for place, (one, its_down) in enumerate(_with_columns(operations, down)):
        if (given := grads[place]) is None:
            inner.append(known.new_zeros(known.numel() // known.shape[-1], one.a.shape[0]))
            continue
        of_weight, of_bias, _, of_b = wants[4 * place : 4 * place + 4]
        grad = flat(given)
        mine = one.part(grad)
        inner.append((mine @ one.b.to(grad.dtype)).mul(one.scale))
        if of_weight:
            results[4 * place] = grad.T @ flat(x)
        if of_bias:
            results[4 * place + 1] = grad.sum(0)
        if of_b:
            results[4 * place + 3] = (mine.T @ its_down).mul(one.scale).to(one.b.dtype)
        if wants_x:
            grad_x = add_product(grad_x, grad, one.weight, again)
    every = inner[0] if len(inner) == 1 else torch.cat(inner, 1)
    if masked is not None and wants_a:
        grad_a = torch.split(every.T @ masked, [one.a.shape[0] for one in operations])
        parts = zip(operations, grad_a, grads[:-1], wants[2::4], strict=True)
        results[2::4] = [
            part.to(one.a.dtype) if wanted and given is not None else None
            for one, part, given, wanted in parts
        ]
    if grad_x is not None:
        grad_x = add_product(grad_x, every, joined, again, factor).view(ctx.shape)
    return grad_x, None, None, *results


def _masked(x: Tensor | None, factor: Tensor | None) -> Tensor:
    if x is None:
        raise LoraFxError(
            "the gradient of B of a frozen A (LoRA-FA) cannot be differentiated again "
            "(create_graph=True), since its input is not kept: make A trainable, or rewrite with "
            "optimize=False"
        )
    return flat(x) if factor is None else flat(x) * factor


def _joined(operations: Sequence[_Operation], dtype: torch.dtype) -> Tensor:
    """All A's, one below the other."""
    each = [one.a.to(dtype) for one in operations]
    return each[0] if len(each) == 1 else torch.cat(each)


def _with_columns(
    operations: Sequence[_Operation], down: Tensor | None
) -> Iterator[tuple[_Operation, Any]]:
    """Each operation with its columns of the product with all A's."""
    start = 0
    for one in operations:
        rank = one.a.shape[0]
        if down is None or len(operations) == 1:
            yield one, down
        else:
            yield one, down.narrow(1, start, rank)
        start += rank
