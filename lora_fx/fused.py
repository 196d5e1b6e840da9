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
    mask = None
    if dropout and training:
        mask = draw(x, dropout)
        scale *= 256 / kept(dropout)
    return _applied(x, mask, ((scale, rows),), (weight, bias, a, b))[0]


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
    """
    each = zip(weights, biases, a, b, strict=True)
    tensors = [tensor for of_one in each for tensor in of_one]
    return _applied(x, None, tuple(zip(scales, rows, strict=True)), tensors)


def _applied(
    x: Tensor,
    mask: Tensor | None,
    options: tuple[tuple[float, _Rows | None], ...],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    kind = x.device.type
    # There is no autocast on the meta device, and asking for it is an error.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _apply(x, mask, options, *tensors)
    dtype = torch.get_autocast_dtype(kind)
    # Weights and biases; factors are cast inside, so that they are saved as they are.
    cast = [
        one.to(dtype) if one is not None and place % 4 < 2 else one
        for place, one in enumerate(tensors)
    ]
    with torch.autocast(kind, enabled=False):
        return _apply(x.to(dtype), mask, options, *cast)


def _apply(*given: Any) -> tuple[Tensor, ...]:
    apply: Any = _LoraLinears.apply
    if not torch.is_grad_enabled():
        apply = _LoraLinears.forward
    elif not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        # The same without a look for default values at forward's signature, which takes longer than forward.
        apply = super(torch.autograd.Function, _LoraLinears).apply
    outputs: tuple[Tensor, ...] = apply(*given)[:-1]
    return outputs


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


class _LoraLinears(torch.autograd.Function):
    """Its last output is the product with the A's: the form that ``torch.func`` needs for what is kept."""

    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, options: Any, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        operations = _operations(options, tensors)
        masked = x if mask is None else x * unpacked(mask, x)
        down = _flat(masked) @ _joined(operations, x.dtype).T
        outputs = []
        for one, its_down in _with_columns(operations, down):
            out = F.linear(x, one.weight, one.bias)
            one.part(_flat(out)).addmm_(its_down, one.b.to(x.dtype).T, alpha=one.scale)
            # It may be a view of a matrix, and autograd forbids to write into views that a function returns;
            # models do (nn.ReLU(inplace=True)).
            outputs.append(torch.ops.aten._unsafe_view.default(out, out.shape))
        return *outputs, down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, options, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, output[-1], *tensors)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, down, *tensors = ctx.saved_tensors
        operations = _operations(ctx.options, tensors)
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        # Differentiated twice, what is kept is no constant, and nothing may be written in place.
        again = torch.is_grad_enabled()
        flat = _flat(x)
        factor = None if mask is None else _flat(unpacked(mask, x))
        joined = _joined(operations, x.dtype)
        masked = flat
        if factor is not None and (again or any(wants[2::4])):
            masked = flat * factor
        if again:
            down = masked @ joined.T
        results: list[Tensor | None] = []
        inner, grad_x = [], None
        for place, (one, its_down) in enumerate(_with_columns(operations, down)):
            of_weight, of_bias, _, of_b = wants[4 * place : 4 * place + 4]
            if (given := grads[place]) is None:
                inner.append(torch.zeros_like(its_down))
                results += [None, None, None, None]
                continue
            grad = _flat(given)
            mine = one.part(grad)
            inner.append((mine @ one.b.to(grad.dtype)).mul(one.scale))
            results += [
                grad.T @ flat if of_weight else None,
                grad.sum(0) if of_bias else None,
                None,
                (mine.T @ its_down).mul(one.scale).to(one.b.dtype) if of_b else None,
            ]
            if wants_x:
                grad_x = _plus(grad_x, grad, one.weight, again)
        every = inner[0] if len(inner) == 1 else torch.cat(inner, 1)
        if any(wants[2::4]):
            grad_a = torch.split(every.T @ masked, [one.a.shape[0] for one in operations])
            for place, (one, part) in enumerate(zip(operations, grad_a, strict=True)):
                if wants[4 * place + 2] and grads[place] is not None:
                    results[4 * place + 2] = part.to(one.a.dtype)
        if grad_x is not None:
            grad_x = _plus(grad_x, every, joined, again, factor)
        return None if grad_x is None else grad_x.view(x.shape), None, None, *results


def _plus(
    total: Tensor | None, left: Tensor, right: Tensor, again: bool, factor: Tensor | None = None
) -> Tensor:
    """``total + factor ∘ (left @ right)``; the total may be written into unless ``again``."""
    if total is None:
        return left @ right
    if factor is not None:
        product = left @ right
        return torch.addcmul(total, product, factor) if again else total.addcmul_(product, factor)
    return torch.addmm(total, left, right) if again else total.addmm_(left, right)


def _joined(operations: Sequence[_Operation], dtype: torch.dtype) -> Tensor:
    """All A's, one below the other."""
    each = [one.a.to(dtype) for one in operations]
    return each[0] if len(each) == 1 else torch.cat(each)


def _with_columns(
    operations: Sequence[_Operation], down: Tensor
) -> Iterator[tuple[_Operation, Tensor]]:
    """Each operation with its columns of the product with all A's."""
    start = 0
    for one in operations:
        rank = one.a.shape[0]
        yield one, down if len(operations) == 1 else down.narrow(1, start, rank)
        start += rank


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
