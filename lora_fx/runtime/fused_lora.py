"""A linear operation and its LoRA branch as one function: ``y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ``.

The branch is added in place (``addmm_``): nothing of the size tokens × features is made for it, forward or
backward, but where dropout needs a masked input. For the backward pass it keeps x, or what x is made of
(:mod:`lora_fx.runtime.recompute`), the product with A ([tokens, r]) and, under dropout, one bit for each
element of x. Autograd over the plain operations keeps the masked input and its mask instead, and makes four
more passes over the output.

Operations that share x have one product with all their A's, forward and backward, and one gradient of x.
Over a quantized weight (QLoRA, arXiv:2305.14314) the kernel of its library computes ``x Wᵀ``, and the
backward pass makes the weight's values again: nothing of their size is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import LoraFxError
from lora_fx.formats import KeptWeight, quantized_linear
from lora_fx.runtime.masks import (
    draw,
    in_planes,
    masked,
    masked_again,
    recovery,
    seed_of,
    transformed,
    unpacked,
)
from lora_fx.runtime.parts import check_not_in_parts
from lora_fx.runtime.recompute import Source, source_of

__all__ = [
    "Kernel",
    "Option",
    "Rows",
    "add_product",
    "applied",
    "apply",
    "autocast_dtype",
    "cast",
    "dropped_outer",
    "dropped_product",
    "flat",
    "lora_linear",
    "lora_linears",
    "quantized_kernel",
    "quantized_lora_linear",
    "without_autocast",
]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a kind of device; None where it is off."""
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _has_autocast(kind: str) -> bool:
    """Return True if autocast exists on a kind of device; on the meta device, asking for it is an error."""
    return torch.amp.is_autocast_available(kind)


torch_private.make_constant(_has_autocast)  # Dynamo of PyTorch 2.11 cannot trace the question


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does it, which leaves fp64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Takes autocast off where it is on: what is computed inside has its dtype already.

    In a backward, too: who enters it for that alone would have products in its dtype added to others.
    """
    if autocast_dtype(kind) is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def apply(
    function: type[torch.autograd.Function],
    plain: Callable[..., tuple[Tensor, ...]],
    given: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """The outputs of an autograd function but the last, which is what it keeps for the backward.

    Args:
        function: It has ``setup_context``.
        plain: The same outputs of plain operations, with nothing in place: under the transforms of
            ``torch.func``, since vmap cannot write a batch into what has none, and for a sparse x, which has
            few operations.
        given: The arguments of both, x before all others.
    """
    compiling = torch.compiler.is_compiling()
    if transformed() or given[0].layout is not torch.strided:
        return plain(*given)
    if compiling and not _wanted(given):
        # Dynamo does not trace a function that has no gradient to compute.
        return plain(*given)
    if not torch.is_grad_enabled():
        return tuple(function.forward(*given)[:-1])
    call: Any = function.apply if compiling else _direct(function)
    return tuple(call(*given)[:-1])


def _direct(function: type[torch.autograd.Function]) -> Any:
    """Return ``function.apply`` without its slow search for defaults in the signature of forward."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def _wanted(given: tuple[Any, ...]) -> bool:
    """Whether anything in a call has a gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(one, Tensor) and one.requires_grad for one in given)


def flat(x: Tensor) -> Tensor:
    """A matrix of the vectors of the last dimension, [tokens, features]."""
    return x.reshape(-1, x.shape[-1])


def dropped_product(x: Tensor, mask: Tensor | None, a: Tensor) -> Tensor:
    """``drop(x) Aᵀ``, [tokens, r], not scaled, where no gradient is recorded.

    Args:
        x: [..., in].
        mask: Of what is dropped, or None.
        a: A, [r, in], in the dtype of x.
    """
    if (seed := seed_of(mask, a)) is not None:
        found: Tensor = torch.ops.lora_fx.dropped_product(x, a, seed)
        return found
    return flat(x if mask is None else masked(x, mask)) @ a.T


def dropped_outer(grad: Tensor, x: Any, own: Any, seed: Tensor | None) -> Tensor:
    """``gradᵀ drop(x)``, [r, in], not scaled: the gradient of A.

    Args:
        grad: That of the product with A, [tokens, r].
        x: [..., in].
        own: ``drop(x)``, [tokens, in], without a seed.
        seed: A mask that kernels read, or None.
    """
    found: Tensor = grad.T @ own if seed is None else torch.ops.lora_fx.dropped_outer(grad, x, seed)
    return found


def add_product(
    total: Tensor | None,
    left: Tensor,
    right: Tensor,
    again: bool,
    factor: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """``total + factor ∘ (left @ right)``.

    Args:
        total: None for zero.
        left: [n, k].
        right: [k, m].
        again: Whether this is differentiated again: then the total may not be written into.
        factor: [n, m], only where there is a total.
        seed: A mask that kernels read, instead of a factor, and only where this is not again.
    """
    if total is None:
        return left @ right
    if seed is not None:
        torch.ops.lora_fx.add_dropped_(total, left, right, seed)
        return total
    if factor is not None:
        product = left @ right
        return torch.addcmul(total, product, factor) if again else total.addcmul_(product, factor)
    return torch.addmm(total, left, right) if again else total.addmm_(left, right)


Rows = tuple[int, int]
"""Which of the outputs a branch is added to: start, stop."""


class Kernel(Protocol):
    """A base product with a weight that has no gradient and is no tensor of autograd's."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + bias``, [..., out], in memory of its own that has no gaps."""

    def to_input(self, grad: Tensor) -> Tensor:
        """``grad W``, [tokens, in], of the gradient of the output, [tokens, out]."""


Option = tuple[float, Rows | None, Kernel | None]


def applied(
    x: Tensor,
    dropout: float,
    options: tuple[Option, ...],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    plain: bool = False,
    source: Source | None = None,
) -> tuple[Tensor, ...]:
    """Runs operations over one x; where autocast is on, the caller has cast what it casts.

    Args:
        x: [..., in].
        dropout: Probability with which an element of the branches' input is zero.
        options: Scale, rows and kernel of each operation.
        tensors: Weight (None with a kernel), bias, A and B of each, one after the other.
        dtype: Of the branches.
        plain: Whether to run the plain operations in any case.
        source: How x, before a cast, is made again in the backward; None to keep it.

    Returns:
        The output of each, [..., out].
    """
    check_not_in_parts(x)
    if x.is_nested:
        return _nested(x, dropout, options, tensors, dtype)
    mask = None
    if dropout:
        mask = draw(x, dropout)
        more = recovery(dropout)
        options = tuple((scale * more, rows, kernel) for scale, rows, kernel in options)
    with without_autocast(x.device.type):
        if plain:
            return _plain(x, mask, dtype, options, None, *tensors)
        return apply(_LoraLinears, _plain, (x, mask, dtype, options, source, *tensors))


def _nested(
    x: Tensor,
    dropout: float,
    options: tuple[Option, ...],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """For sequences of several lengths (``torch.nested``), which have few operations, and no mask of bits."""
    masked = F.dropout(x, dropout) if dropout else x
    return _one_by_one(x, masked.to(dtype), options, tensors)


class _Operation(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    rows: Rows | None
    kernel: Kernel | None

    def base(self, x: Tensor) -> Tensor:
        """The output without the branch."""
        if self.kernel is None:
            return F.linear(x, self.weight, self.bias)
        return self.kernel.product(x, self.bias)

    def part(self, x: Tensor) -> Tensor:
        """The outputs that the branch is added to."""
        return x if self.rows is None else x[:, self.rows[0] : self.rows[1]]

    def to_input(self, total: Tensor | None, grad: Tensor, exact: Tensor, again: bool) -> Tensor:
        """``total`` and the base's gradient of x.

        Args:
            total: None for zero; in the dtype of the branches.
            grad: The gradient of the output, [tokens, out], in that dtype.
            exact: The same as it came.
            again: Whether this is differentiated again.
        """
        if self.kernel is None:
            return add_product(total, grad, self.weight, again)
        product = self.kernel.to_input(exact).to(grad.dtype)
        return product if total is None else total + product


def _operations(options: Any, tensors: Sequence[Any]) -> list[_Operation]:
    return [
        _Operation(*tensors[4 * place : 4 * place + 4], *option)
        for place, option in enumerate(options)
    ]


def _plain(
    x: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    options: Any,
    source: Source | None,
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    own = x.to(dtype)
    own = own if mask is None else masked(own, mask)
    return _one_by_one(x, own, options, tensors)


def _one_by_one(
    x: Tensor, masked: Tensor, options: Any, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    outputs = []
    for one in _operations(options, tensors):
        out = one.base(x)
        down = F.linear(masked, one.a.to(masked.dtype)).to(out.dtype)
        up = one.b.to(out.dtype)
        if one.rows is not None:
            # Rows of zeros, and not columns of the output: a nested one cannot be padded.
            up = F.pad(up, (0, 0, one.rows[0], out.shape[-1] - one.rows[1]))
        outputs.append(out + F.linear(down, up) * one.scale)
    return tuple(outputs)


class _LoraLinears(torch.autograd.Function):
    """Its last output is the product with the A's: what is kept for the backward has to be an output."""

    @staticmethod
    def forward(
        x: Tensor,
        mask: Tensor | None,
        dtype: torch.dtype,
        options: Any,
        source: Source | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        operations = _operations(options, tensors)
        # First the operations themselves: if x has a wrong shape, the error is that of the layer.
        bases = [operation.base(x) for operation in operations]
        down = dropped_product(x.to(dtype), mask, _joined(operations, dtype))
        outputs = []
        for out, (one, its_down) in zip(bases, _with_columns(operations, down), strict=True):
            up = one.b.to(out.dtype).T
            one.part(flat(out)).addmm_(its_down.to(out.dtype), up, alpha=one.scale)
            # It may be a view of a matrix, and autograd forbids to write into views that a function returns;
            # models do (nn.ReLU(inplace=True)).
            outputs.append(torch_private.UNSAFE_VIEW(out, out.shape))
        return *outputs, down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, dtype, options, source, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        wants = ctx.needs_input_grad[5:]
        wants_a = any(wants[2::4])
        # A frozen A (LoRA-FA, arXiv:2308.03303) is there to save x. A compiler sees by itself what is read.
        keep = wants_a or any(wants[::4]) or torch.compiler.is_compiling()
        mask = mask if ctx.needs_input_grad[0] or wants_a else None
        down = output[-1] if any(wants[3::4]) else None
        # Of what is made again, its own inputs: they are kept anyway.
        again = source.given if keep and source is not None else ()
        ctx.source = source.kept() if again else None
        ctx.save_for_backward(x if keep and not again else None, mask, down, *tensors, *again)
        ctx.dtype, ctx.options, ctx.shape = dtype, options, x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(known.device.type):
            found = _gradients(ctx, *grads)
        if ctx.source is not None:
            ctx.source.done()
        return found


class _LoraLinear(torch.autograd.Function):
    """The common case: one operation without dropout over a dense weight, all in one dtype.

    It has the arguments and the result of :class:`_LoraLinears`, with less Python. The products of a model
    push the interpreter out of the processor's caches, so that each line of Python costs time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _mask: None,
        dtype: torch.dtype,
        options: Any,
        _source: None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        out = F.linear(x, weight, bias)  # first: its error is the layer's if x has a wrong shape
        down = x.reshape(-1, x.shape[-1]) @ a.T
        out.view(-1, out.shape[-1]).addmm_(down, b.T, alpha=options[0][0])
        kept = x if a.requires_grad or weight.requires_grad else None
        ctx.save_for_backward(kept, None, down if b.requires_grad else None, weight, bias, a, b)
        ctx.dtype, ctx.options, ctx.shape, ctx.source = dtype, options, x.shape, None
        result: Tensor = torch_private.UNSAFE_VIEW(out, out.shape)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, *_, of_weight, of_bias, of_a, of_b = ctx.needs_input_grad
        if of_weight or of_bias or torch.is_grad_enabled() or torch_private.in_autocast():
            general: Any = _LoraLinears.backward(ctx, grad, None)
            return tuple(general)
        x, _, down, weight, _, a, b = ctx.saved_tensors
        rows, scale = grad.reshape(-1, grad.shape[-1]), ctx.options[0][0]
        inner = (rows @ b).mul_(scale)
        return (
            (rows @ weight).addmm_(inner, a).view(ctx.shape) if wants_x else None,
            *(None,) * 6,
            inner.T @ x.reshape(-1, x.shape[-1]) if of_a else None,
            (rows.T @ down).mul_(scale) if of_b else None,
        )


def _is_plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Return True if :class:`_LoraLinear` can take a call without dropout."""
    return (
        type(x) is Tensor
        and x.dtype is a.dtype is b.dtype is weight.dtype
        and torch.is_grad_enabled()
        and not x.is_nested
        and x.layout is torch.strided
        and not torch_private.in_autocast()
        and not transformed()
        and source_of(x) is None
    )


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of every argument of forward, from those of its outputs, some of which may be None."""
    kept, mask, down, *tensors = ctx.saved_tensors
    operations, dtype = _operations(ctx.options, tensors), ctx.dtype
    wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
    wants_a = any(wants[2::4])
    known = next(grad for grad in grads if grad is not None)
    # Differentiated twice, what is kept is no constant, and nothing may be written in place.
    again = torch.is_grad_enabled()
    if ctx.source is not None:
        kept = ctx.source.value(tensors[4 * len(operations) :], again)
    x: Any = None if kept is None else kept.to(dtype)
    like = known.new_empty((), dtype=dtype).expand(ctx.shape)
    joined = _joined(operations, dtype)
    planes = mask if mask is not None and in_planes(mask) else None
    seed = None if again else seed_of(mask, joined)
    laid_out = mask is not None and planes is None and seed is None
    factor = flat(unpacked(mask, like)) if laid_out else None
    own = None
    if seed is None and (wants_a or (again and any(wants[3::4]) and wants_x)):
        own = _masked(x, factor, planes)
        down = own @ joined.T if again else down
    results: list[Tensor | None] = [None] * len(wants)
    inner, grad_x = [], None
    for place, (one, its_down) in enumerate(_with_columns(operations, down)):
        if (given := grads[place]) is None:
            shape = (known.numel() // known.shape[-1], one.a.shape[0])
            inner.append(known.new_zeros(shape, dtype=dtype))
            continue
        of_weight, of_bias, _, of_b = wants[4 * place : 4 * place + 4]
        grad = flat(given).to(dtype)
        mine = one.part(grad)
        inner.append((mine @ one.b.to(dtype)).mul(one.scale))
        if of_weight:
            results[4 * place] = grad.T @ flat(x)
        if of_bias:
            results[4 * place + 1] = grad.sum(0)
        if of_b:
            results[4 * place + 3] = (mine.T @ its_down).mul(one.scale).to(one.b.dtype)
        if wants_x:
            grad_x = one.to_input(grad_x, grad, flat(given), again)
    every = inner[0] if len(inner) == 1 else torch.cat(inner, 1)
    if wants_a:
        ranks = [one.a.shape[0] for one in operations]
        grad_a = torch.split(dropped_outer(every, x, own, seed), ranks)
        parts = zip(operations, grad_a, grads[:-1], wants[2::4], strict=True)
        results[2::4] = [
            part.to(one.a.dtype) if wanted and given is not None else None
            for one, part, given, wanted in parts
        ]
    if grad_x is not None and planes is not None:
        grad_x = masked_again(every @ joined, planes, grad_x).view(ctx.shape)
    elif grad_x is not None:
        grad_x = add_product(grad_x, every, joined, again, factor, seed).view(ctx.shape)
    return grad_x, None, None, None, None, *results


def _masked(x: Tensor | None, factor: Tensor | None, planes: Tensor | None) -> Tensor:
    if x is None:
        raise LoraFxError(
            "the gradient of B of a frozen A (LoRA-FA) cannot be differentiated again "
            "(create_graph=True), since its input is not kept: make A trainable, or rewrite with "
            "optimize=False"
        )
    if planes is not None:
        return masked_again(flat(x), planes)
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


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
    rows: Rows | None = None,
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
            :func:`lora_fx.runtime.masks.kept` says.
        training: Whether there is dropout now.
        rows: Which of the outputs (start, stop) the branch is added to; None for all.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass, where A is frozen and both x and B require a gradient.
    """
    dropout = dropout if training else 0.0
    if not (torch.compiler.is_compiling() or dropout or rows) and _is_plain(x, weight, a, b):
        options = ((scale, None, None),)
        result: Tensor = _direct(_LoraLinear)(x, None, x.dtype, options, None, weight, bias, a, b)
        return result
    return _cast(x, dropout, [(scale, rows)], (weight, bias, a, b))[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[Rows | None],
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
    return _cast(x, 0.0, tuple(zip(scales, rows, strict=True)), tensors)


def _cast(
    x: Tensor,
    dropout: float,
    options: Sequence[tuple[float, Rows | None]],
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    dtype, source = autocast_dtype(x.device.type), source_of(x)
    if dtype is not None:
        x = cast(x, dtype)
        # Weights and biases; factors are cast inside, so that they are saved as they are.
        tensors = [
            cast(one, dtype) if one is not None and place % 4 < 2 else one
            for place, one in enumerate(tensors)
        ]
    all_options = tuple((*one, None) for one in options)
    return applied(x, dropout, all_options, tensors, x.dtype, source=source)


def quantized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
    rows: Rows | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    base_training: bool = False,
) -> Tensor:
    """:func:`lora_fx.formats.weights.quantized_linear` with a LoRA branch.

    The product is that of the operation alone to the last bit, and so is its dtype, also under autocast;
    the branch is computed in autocast's dtype, or in that of ``x``. Otherwise it behaves as
    :func:`lora_fx.runtime.fused_lora.lora_linear` does, but that a compiler sees plain operations and
    decides by itself what to keep. The weight is frozen.

    Args:
        x: [..., in].
        weight: A quantized [out, in].
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The factor s of the branch.
        dropout: Probability with which an element of the branch's input is zero; rounded as
            :func:`lora_fx.runtime.masks.kept` says.
        training: Whether there is dropout now.
        rows: Which of the outputs (start, stop) the branch is added to; None for all.
        compute_dtype: Of the product, as the next two; see :func:`lora_fx.formats.weights.quantized_linear`.
        threshold: Of LLM.int8().
        base_training: Whether the model trains, which LLM.int8() asks.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass, where A is frozen and both x and B require a gradient.
    """
    kernel, dtype = quantized_kernel(x, weight, compute_dtype, threshold, base_training)
    dropout = dropout if training else 0.0
    plain = torch.compiler.is_compiling()
    options = ((scale, rows, kernel),)
    return applied(x, dropout, options, (None, bias, a, b), dtype, plain, source_of(x))[0]


def quantized_kernel(
    x: Tensor,
    weight: Tensor,
    compute_dtype: torch.dtype | None,
    threshold: float,
    base_training: bool,
) -> tuple[Kernel, torch.dtype]:
    """What computes the product with a quantized weight, and the dtype of branches next to it.

    The arguments are those of :func:`quantized_lora_linear`.
    """
    under = autocast_dtype(x.device.type)
    dtype = x.dtype if under is None or x.dtype == torch.float64 else under
    kept = KeptWeight.of(weight)
    return _Product(kept, compute_dtype, threshold, base_training, under), dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Product:
    """The base, a :class:`lora_fx.runtime.fused_lora.Kernel`."""

    weight: KeptWeight
    compute_dtype: torch.dtype | None
    threshold: float
    training: bool
    autocast: torch.dtype | None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        with self._autocast(x.device.type):
            out = quantized_linear(
                x, self.weight.weight, bias, self.compute_dtype, self.threshold, self.training
            )
        return out.contiguous()

    def to_input(self, grad: Tensor) -> Tensor:
        dtype = self.compute_dtype or self.autocast or grad.dtype
        return grad.to(dtype) @ self.weight.values(dtype)

    def _autocast(self, kind: str) -> contextlib.AbstractContextManager[object]:
        """As it was where the operation was called: around it, it is off."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(kind, self.autocast)
