"""A linear operation and its LoRA branch as one function: ``y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ``.

The branch is added in place (``addmm_``). Without dropout, neither pass allocates a tensor of tokens ×
features for the branch. For the backward pass the function keeps x, or the tensors from which x is computed
again (:mod:`lora_fx.runtime.kernels.recompute`). It also keeps the product with A ([tokens, r]) and, with
dropout, one bit for each element of x. Autograd over the plain operations keeps the masked input and its
mask, and makes four more passes over the output.

Operations that share x have one product with all their A's in each pass, and one gradient of x. Over a
quantized weight (QLoRA, arXiv:2305.14314) the kernel of its library computes ``x Wᵀ``. The backward pass
dequantizes the weight again, so that no tensor of that size is kept.
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
from lora_fx.runtime.kernels.masks import (
    draw,
    in_planes,
    masked,
    masked_again,
    recovery,
    seed_of,
    transformed,
    unpacked,
)
from lora_fx.runtime.kernels.recompute import Source, source_of
from lora_fx.runtime.modules import check_not_in_parts

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
    "writable",
]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device type, or None if autocast is off."""
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _has_autocast(kind: str) -> bool:
    """Return True if a device type has autocast. For the meta device, PyTorch's other queries raise."""
    return torch.amp.is_autocast_available(kind)


torch_private.make_constant(_has_autocast)  # Dynamo of PyTorch 2.11 cannot trace it


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor as autocast does: fp64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Return a context that disables autocast, because the tensors inside have their dtype already.

    A backward pass needs it as well: a caller's autocast would mix products of two dtypes.
    """
    if autocast_dtype(kind) is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def apply(
    function: type[torch.autograd.Function],
    plain: Callable[..., tuple[Tensor, ...]],
    arguments: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Run an autograd function, and return its outputs without the last, which only its backward reads.

    Args:
        function: A function with ``setup_context``.
        plain: A function that computes the same outputs with plain operations, none of them in place. It runs
            in programs of ``torch.export``, and for a sparse x, which few operations support. It also runs
            under the transforms of ``torch.func``: vmap cannot write a batch into a tensor without one.
        arguments: The arguments of both; the first is x.
    """
    compiling = torch.compiler.is_compiling()
    if transformed() or arguments[0].layout is not torch.strided:
        return plain(*arguments)
    if compiling and (torch_private.in_export() or not _needs_gradient(arguments)):
        # Runtimes of exported programs may use other strides than the trace, and then a view of an output
        # fails. Dynamo does not trace an autograd function that computes no gradient.
        return plain(*arguments)
    if not torch.is_grad_enabled():
        return tuple(function.forward(*arguments)[:-1])
    call: Any = function.apply if compiling else _direct(function)
    return tuple(call(*arguments)[:-1])


def _direct(function: type[torch.autograd.Function]) -> Any:
    """Return ``function.apply`` without its slow search for defaults in the signature of forward."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def flat(x: Tensor) -> Tensor:
    """Return x as a matrix, [tokens, features]."""
    return x.reshape(-1, x.shape[-1])


def dropped_product(x: Tensor, mask: Tensor | None, a: Tensor) -> Tensor:
    """Compute ``drop(x) Aᵀ``, [tokens, r], without the scale. No gradient is recorded.

    Args:
        x: [..., in].
        mask: The mask of dropout, or None.
        a: A, [r, in], in the dtype of x.
    """
    if (seed := seed_of(mask, a)) is not None:
        product: Tensor = torch.ops.lora_fx.dropped_product(x, a, seed)
        return product
    return flat(x if mask is None else masked(x, mask)) @ a.T


def dropped_outer(grad: Tensor, x: Any, own: Any, seed: Tensor | None) -> Tensor:
    """Compute the gradient of A, ``gradᵀ drop(x)``, [r, in], without the scale.

    Args:
        grad: The gradient of the product with A, [tokens, r].
        x: [..., in]. Read only with a seed.
        own: ``drop(x)``, [tokens, in]. Read only without a seed.
        seed: The seed from which kernels draw the mask, or None.
    """
    if seed is None:
        return torch.mm(grad.T, own)
    gradient: Tensor = torch.ops.lora_fx.dropped_outer(grad, x, seed)
    return gradient


def writable(out: Tensor) -> Tensor:
    """Return a base output to which a branch may be added in place.

    This is the output itself, or a copy if selective checkpointing may keep the output.
    """
    if torch.compiler.is_compiling() or not torch_private.in_selective_checkpoint():
        return out
    return out.clone()


def add_product(
    total: Tensor | None,
    left: Tensor,
    right: Tensor,
    again: bool,
    factor: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute ``total + factor ∘ (left @ right)``, if possible in ``total``.

    Args:
        total: [n, m], or None for zero.
        left: [n, k].
        right: [k, m].
        again: True if the result is differentiated again. Then ``total`` is not changed.
        factor: [n, m], or None. Only with a ``total``.
        seed: The seed from which kernels draw the mask, in the place of a factor. Only without ``again``.
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
"""The outputs to which a branch is added: start, stop."""


class Kernel(Protocol):
    """Product with a frozen weight, such as a quantized one. Autograd does not see the product."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x Wᵀ + bias``, [..., out], as a new contiguous tensor."""

    def to_input(self, grad: Tensor) -> Tensor:
        """Compute ``grad W``, [tokens, in], from the gradient of the output, [tokens, out]."""


Option = tuple[float, Rows | None, Kernel | None]
"""The scale of a branch, its outputs (None for all), and the kernel of its base product if there is one."""


def applied(
    x: Tensor,
    dropout: float,
    options: tuple[Option, ...],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    plain: bool = False,
    source: Source | None = None,
) -> tuple[Tensor, ...]:
    """Run linear operations with branches on one input. The caller has cast tensors for autocast.

    Args:
        x: [..., in].
        dropout: Probability with which an element of the branches' input is zero.
        options: Scale, rows and kernel of each operation.
        tensors: Weight (None with a kernel), bias, A and B of each operation, as one sequence.
        dtype: Dtype of the branches.
        plain: True to run the plain operations in any case.
        source: The way to compute x, before a cast, again in the backward pass; None to keep x.

    Returns:
        The output of each operation, [..., out].
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
    """Run linear operations with branches on a nested tensor, with plain operations and PyTorch's dropout."""
    masked = F.dropout(x, dropout) if dropout else x
    return _one_by_one(x, masked.to(dtype), options, tensors)


class _OperationTensors(NamedTuple):
    """Values for the weight, the bias, A and B of one operation, such as tensors or flags."""

    weight: Any = None
    bias: Any = None
    a: Any = None
    b: Any = None


def _in_fours(values: Sequence[Any]) -> list[_OperationTensors]:
    return [_OperationTensors(*values[start : start + 4]) for start in range(0, len(values), 4)]


class _Operation(NamedTuple):
    """One linear operation of a call, with its branch."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    rows: Rows | None
    kernel: Kernel | None

    def base(self, x: Tensor) -> Tensor:
        """Compute ``x Wᵀ + bias``, the output without the branch."""
        if self.kernel is None:
            return F.linear(x, self.weight, self.bias)
        return self.kernel.product(x, self.bias)

    def part(self, x: Tensor) -> Tensor:
        """Return the columns of an output matrix to which the branch is added."""
        return x if self.rows is None else x[:, self.rows[0] : self.rows[1]]

    def to_input(self, total: Tensor | None, grad: Tensor, exact: Tensor, again: bool) -> Tensor:
        """Add the gradient of x through the base to ``total``, [tokens, in].

        Args:
            total: In the dtype of the branches, or None for zero.
            grad: The gradient of the output, [tokens, out], in that dtype.
            exact: The same gradient before the cast.
            again: True if the result is differentiated again.
        """
        if self.kernel is None:
            return add_product(total, grad, self.weight, again)
        product = self.kernel.to_input(exact).to(grad.dtype)
        return product if total is None else total + product


def _operations(options: Any, tensors: Sequence[Any]) -> list[_Operation]:
    fours = _in_fours(tensors[: 4 * len(options)])
    return [_Operation(*four, *option) for four, option in zip(fours, options, strict=True)]


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
    for operation in _operations(options, tensors):
        out = operation.base(x)
        down = F.linear(masked, operation.a.to(masked.dtype)).to(out.dtype)
        up = operation.b.to(out.dtype)
        if operation.rows is not None:
            # Pad B, because a nested output cannot be padded.
            start, stop = operation.rows
            up = F.pad(up, (0, 0, start, out.shape[-1] - stop))
        outputs.append(out + F.linear(down, up) * operation.scale)
    return tuple(outputs)


class _LoraLinears(torch.autograd.Function):
    """Autograd function of several linear operations with branches on one input.

    The last output is the product with all A's, which the backward reads.
    """

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
        bases = [writable(operation.base(x)) for operation in operations]
        down = dropped_product(x.to(dtype), mask, _joined(operations, dtype))
        outputs = []
        for out, (operation, own_down) in zip(bases, _with_columns(operations, down), strict=True):
            up = operation.b.to(out.dtype).T
            operation.part(flat(out)).addmm_(own_down.to(out.dtype), up, alpha=operation.scale)
            # Models write into outputs (nn.ReLU(inplace=True)). Autograd forbids that for a view that a
            # function returns.
            outputs.append(torch_private.UNSAFE_VIEW(out, out.shape))
        return *outputs, down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, dtype, options, source, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        wanted = _in_fours(ctx.needs_input_grad[5:])
        wants_a = any(four.a for four in wanted)
        # A frozen A (LoRA-FA, arXiv:2308.03303) saves the memory of x. A compiler drops what is not read.
        keep = wants_a or any(four.weight for four in wanted) or torch.compiler.is_compiling()
        mask = mask if ctx.needs_input_grad[0] or wants_a else None
        down = output[-1] if any(four.b for four in wanted) else None
        # To compute x again, keep the inputs of its computation, which other operations keep anyway.
        again = source.saved if keep and source is not None else ()
        ctx.source = source.kept() if again else None
        ctx.save_for_backward(x if keep and not again else None, mask, down, *tensors, *again)
        ctx.dtype, ctx.options, ctx.shape = dtype, options, x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        some_grad = next((grad for grad in grads if grad is not None), None)
        if some_grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(some_grad.device.type):
            gradients = _gradients(ctx, *grads)
        if ctx.source is not None:
            ctx.source.done()
        return gradients


class _LoraLinear(torch.autograd.Function):
    """Autograd function of the common case: one dense operation without dropout, all in one dtype.

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
        # First the operation itself: if x has a wrong shape, the error is that of the layer.
        out = writable(F.linear(x, weight, bias))
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
    """Compute the gradients of all arguments of :class:`_LoraLinears`.

    The gradient of an output that nothing reads is None.
    """
    saved_x, mask, down, *tensors = ctx.saved_tensors
    operations, dtype = _operations(ctx.options, tensors), ctx.dtype
    wants_x, wanted = ctx.needs_input_grad[0], _in_fours(ctx.needs_input_grad[5:])
    wants_a = any(four.a for four in wanted)
    some_grad = next(grad for grad in grads if grad is not None)
    # In a second differentiation the saved tensors are no constants, and nothing is written in place.
    again = torch.is_grad_enabled()
    if ctx.source is not None:
        saved_x = ctx.source.value(tensors[4 * len(operations) :], again)
    x: Any = None if saved_x is None else saved_x.to(dtype)
    like = some_grad.new_empty((), dtype=dtype).expand(ctx.shape)
    joined = _joined(operations, dtype)
    planes = mask if mask is not None and in_planes(mask) else None
    seed = None if again else seed_of(mask, joined)
    laid_out = mask is not None and planes is None and seed is None
    factor = flat(unpacked(mask, like)) if laid_out else None
    own = None
    if seed is None and (wants_a or (again and wants_x and any(four.b for four in wanted))):
        own = _masked(x, factor, planes)
        down = own @ joined.T if again else down
    gradients: list[_OperationTensors] = []
    inner, grad_x = [], None
    for (operation, own_down), wants, output_grad in zip(
        _with_columns(operations, down), wanted, grads[:-1], strict=True
    ):
        if output_grad is None:
            shape = (some_grad.numel() // some_grad.shape[-1], operation.a.shape[0])
            inner.append(some_grad.new_zeros(shape, dtype=dtype))
            gradients.append(_OperationTensors())
            continue
        grad = flat(output_grad).to(dtype)
        part = operation.part(grad)
        inner.append((part @ operation.b.to(dtype)).mul(operation.scale))
        grad_b = (part.T @ own_down).mul(operation.scale) if wants.b else None
        gradients.append(
            _OperationTensors(
                weight=grad.T @ flat(x) if wants.weight else None,
                bias=grad.sum(0) if wants.bias else None,
                b=None if grad_b is None else grad_b.to(operation.b.dtype),
            )
        )
        if wants_x:
            grad_x = operation.to_input(grad_x, grad, flat(output_grad), again)
    every = inner[0] if len(inner) == 1 else torch.cat(inner, 1)
    if wants_a:
        ranks = [operation.a.shape[0] for operation in operations]
        columns = torch.split(dropped_outer(every, x, own, seed), ranks)
        gradients = [
            four._replace(a=grad_a.to(operation.a.dtype)) if wants.a and grad is not None else four
            for four, operation, grad_a, wants, grad in zip(
                gradients, operations, columns, wanted, grads[:-1], strict=True
            )
        ]
    if grad_x is not None and planes is not None:
        grad_x = masked_again(every @ joined, planes, grad_x).view(ctx.shape)
    elif grad_x is not None:
        grad_x = add_product(grad_x, every, joined, again, factor, seed).view(ctx.shape)
    return grad_x, None, None, None, None, *(gradient for four in gradients for gradient in four)


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
    """Concatenate all A's, [sum of ranks, in]."""
    each = [operation.a.to(dtype) for operation in operations]
    return each[0] if len(each) == 1 else torch.cat(each)


def _with_columns(
    operations: Sequence[_Operation], down: Tensor | None
) -> Iterator[tuple[_Operation, Any]]:
    """Yield each operation with its columns of ``down``, the product of x with all A's."""
    start = 0
    for operation in operations:
        rank = operation.a.shape[0]
        if down is None or len(operations) == 1:
            yield operation, down
        else:
            yield operation, down.narrow(1, start, rank)
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
    """Compute a linear operation with a LoRA branch (Hu et al. 2021, arXiv:2106.09685).

    Under autocast it computes in autocast's dtype (fp64 stays fp64, as in PyTorch), otherwise in that of
    ``x``. Factors of another dtype are cast to it, and their gradients are computed in it. So fp16 without
    autocast needs a gradient scaler, as a model in fp16 does. The function can be differentiated twice,
    compiled and checkpointed. Under the transforms of ``torch.func``, and for nested tensors, it runs plain
    operations. Forward-mode differentiation outside of ``torch.func`` is an error. If A is frozen, x is not
    kept.

    Args:
        x: [..., in].
        weight: [out, in], of any strides.
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The factor s of the branch.
        dropout: Probability with which an element of the branch's input is zero; rounded as
            :func:`lora_fx.runtime.kernels.masks.kept` says.
        training: True to apply dropout.
        rows: The outputs (start, stop) to which the branch is added; None for all.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass if A is frozen, and both x and B require a gradient.
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
    """Compute several :func:`lora_linear` with one input, without dropout.

    Ranks and numbers of outputs may differ.

    Args:
        x: [..., in].
        weights: The weight of each operation, [out, in].
        biases: The bias of each, [out] or None.
        a: The A of each, [r, in].
        b: The B of each, [n, r].
        scales: The factor s of each branch.
        rows: The outputs to which each branch is added, or None for all.

    Returns:
        The output of each operation, [..., out].

    Raises:
        LoraFxError: For the same reason as :func:`lora_linear`.
    """
    fours = zip(weights, biases, a, b, strict=True)
    tensors = [tensor for four in fours for tensor in four]
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
        # Factors are cast inside, so that they are saved in their own dtype.
        tensors = [
            tensor
            for weight, bias, a, b in _in_fours(tensors)
            for tensor in (cast(weight, dtype), None if bias is None else cast(bias, dtype), a, b)
        ]
    all_options = tuple((*option, None) for option in options)
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
    """Compute :func:`lora_fx.formats.weights.quantized_linear` with a LoRA branch.

    The base product has the dtype and the bits of the operation without a branch, also under autocast. The
    branch is computed in autocast's dtype, or in that of ``x``. The weight is frozen. Otherwise it behaves as
    :func:`lora_fx.runtime.kernels.fused_lora.lora_linear` does, except that a compiler sees plain operations
    and decides what to keep.

    Args:
        x: [..., in].
        weight: The quantized weight, [out, in].
        bias: [out], or None.
        a: A, [r, in].
        b: B, [n, r], with n the number of ``rows``.
        scale: The factor s of the branch.
        dropout: Probability with which an element of the branch's input is zero; rounded as
            :func:`lora_fx.runtime.kernels.masks.kept` says.
        training: True to apply dropout.
        rows: The outputs (start, stop) to which the branch is added; None for all.
        compute_dtype: Dtype of the base's product; see :func:`lora_fx.formats.weights.quantized_linear`.
        threshold: The threshold of LLM.int8().
        base_training: True if the model trains. LLM.int8() depends on it.

    Returns:
        [..., out].

    Raises:
        LoraFxError: In a second backward pass if A is frozen, and both x and B require a gradient.
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
    """Return the product with a quantized weight, and the dtype of branches next to it.

    The arguments are those of :func:`quantized_lora_linear`.
    """
    under = autocast_dtype(x.device.type)
    dtype = x.dtype if under is None or x.dtype == torch.float64 else under
    kept = KeptWeight.of(weight)
    return _Product(kept, compute_dtype, threshold, base_training, under), dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Product:
    """The product with a quantized weight, a :class:`Kernel`."""

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
        """Return a context that restores the autocast state of the call, because the caller disabled it."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(kind, self.autocast)
