"""Weight-decomposed adapters at training time: ``y' = g ∘ x (W + s·BA)ᵀ + bias``, ``g = m / ‖W + s·BA‖``.

DoRA (Liu et al. 2024, arXiv:2402.09353) trains a magnitude m for each output feature. The factors train the
direction of its weights. The norm is taken over all weights of a feature, and is a constant for the gradient
(section 4.3). The term ``(g - 1) ∘ (y - bias) + g ∘ s·x AᵀBᵀ`` is added to the base output y, without a
second product with W. The gradient of m needs ``y - bias``, which no layer saves. :func:`rescaled` and
:func:`recomputed` are two ways to get it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.errors import LoraFxError
from lora_fx.formats import dense, quantization_of
from lora_fx.runtime.kernels.masks import transformed
from lora_fx.runtime.kernels.recompute import lazy_copy
from lora_fx.runtime.modules import (
    check_not_in_parts,
    compute_in_parts,
    factor_beside,
    is_in_parts,
    own_part,
    summed_over_inputs,
)

__all__ = [
    "applied_weight",
    "dense_gain",
    "dense_norm",
    "divisible",
    "gain",
    "held",
    "recomputed",
    "rescaled",
    "scaled_b",
    "shifted",
    "times_gains",
    "weight_norm",
]


_CHUNK = 1 << 20  # least number of elements of a half-precision weight to widen at a time
_BLOCK = 512  # most numbers to sum at once
_LEAST = 32  # least numbers to sum at once
_PIECES = 16  # most pieces that a weight is split into


@torch.no_grad()
def weight_norm(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, layout: str = "out_in", groups: int = 1
) -> Tensor:
    """Return the Euclidean norm of every output feature of ``W + s·BA``, over its inputs and kernel.

    Args:
        weight: [out, in/g, *k], or with the first two swapped ([in, out/g, *k]) for ``layout="in_out"``.
        a: [r, in/g, *k].
        b: [out, r/g, 1, ...].
        scale: s.
        layout: "out_in" or "in_out", the order of the weight's first two axes.
        groups: The groups g of a convolution.

    Returns:
        [out], detached, in fp32, or fp64 for an fp64 weight.
    """
    return _norm_of(_squared_norm(weight, a, b, scale, layout, groups))


def _norm_of(square: Tensor) -> Tensor:
    # If B A cancels W, rounding may leave the sum of the three terms below zero.
    return square.clamp_min(0).sqrt().flatten()


def _squared_norm(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, layout: str, groups: int
) -> Tensor:
    """Return the square of :func:`weight_norm`, which is a sum over the inputs."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    up = b.detach().to(wide)
    # Three dimensions only for groups: the overhead of an operation matters for a small weight.
    up = up.reshape(groups, -1, b.shape[1]) if groups > 1 else up.flatten(1)
    sums: tuple[Tensor, ...] | None = None
    with _full_precision(weight):
        for matrix, down in _matrices(weight.detach(), a.detach().to(wide), layout, groups):
            products, squares = _products_and_squares(matrix, down)
            parts = (squares, products, down @ down.mT)
            sums = parts if sums is None else tuple(map(torch.add, sums, parts))
        assert sums is not None  # a kernel has at least one position
        own, crossed, gram = sums
        add_product = torch.addmm if groups == 1 else torch.baddbmm
        mixed = add_product(crossed, up, gram, beta=2 * scale, alpha=scale**2)
        return own + (mixed * up).sum(-1)


def _matrices(
    weight: Tensor, a: Tensor, layout: str, groups: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the weight and A as [out, n] and [r, n], or as [g, out/g, n] and [g, r/g, n].

    There is one pair, or for a transposed convolution one pair for each position of the kernel.
    """
    if layout == "in_out" and weight.dim() == 2:
        yield weight.T, a
    elif layout == "in_out":
        kernels, downs = weight.flatten(2), a.flatten(2)
        if groups > 1:
            kernels, downs = (torch.unflatten(t, 0, (groups, -1)) for t in (kernels, downs))
        for position in range(kernels.shape[-1]):
            yield kernels[..., position].mT, downs[..., position]
    else:
        matrix, down = weight, a
        if weight.dim() > 2:
            # Read the weight in memory order, which may be channels last.
            strides = weight.stride()
            order = sorted(range(1, weight.dim()), key=lambda axis: -strides[axis])
            matrix, down = (t.permute(0, *order).flatten(1) for t in (weight, a))
        if groups > 1:
            matrix, down = (torch.unflatten(t, 0, (groups, -1)) for t in (matrix, down))
        yield matrix, down


def _products_and_squares(matrix: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``W Aᵀ``, and the squared norm of each row of W.

    A half-precision weight is cast to the dtype of A piece by piece, to save memory.
    """
    if matrix.dtype == down.dtype:
        return matrix @ down.mT, _squares(matrix)
    count = min(_PIECES, -(-matrix.numel() // _CHUNK))
    products, squares = [], []
    for piece in matrix.chunk(max(1, count), dim=-2):
        wide = piece.to(down.dtype)
        products.append(wide @ down.mT)
        squares.append(_squares(wide))
    return torch.cat(products, dim=-2), torch.cat(squares, dim=-1)


def _squares(matrix: Tensor) -> Tensor:
    """Return ``Σ w²`` of each row. Long rows are summed in blocks, because a kernel may lose digits."""
    length = matrix.shape[-1]
    if length <= _BLOCK:
        return _squared(matrix)
    block = _block(length)
    whole = length - length % block
    blocks = torch.unflatten(matrix[..., :whole], -1, (-1, block))
    sums = _squared(blocks).sum(-1)
    return sums if whole == length else sums + _squared(matrix[..., whole:])


@functools.cache
def _block(length: int) -> int:
    """Return a block size for sums over rows of this length, which divides the length if possible.

    Matrices without gaps are read much faster.

    It divides the length if possible, because matrices without gaps are read much faster.
    """
    fitting = (size for size in range(_BLOCK, _LEAST - 1, -1) if length % size == 0)
    return next(fitting, _BLOCK)


def _squared(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms.square()


def _full_precision(weight: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context that disables autocast, whose half types are too coarse for a sum of squares."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


_SMALLEST = 2**-3  # outputs are not divided by smaller gains


def gain(
    magnitude: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    layout: str = "out_in",
    groups: int = 1,
    view: Sequence[int] | None = None,
    rows: tuple[int, int] | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Return ``g = m / ‖W + s·BA‖``, differentiable in m only.

    A feature whose weights are all zero has no direction and no magnitude. Its gain is 1, so that B can train
    (m / 0 would make the output NaN).

    Args:
        magnitude: m, with ``out`` elements.
        weight: W, the parameter.
        a: A, [r, in/g, *k].
        b: B, [out, r/g, 1, ...].
        scale: s.
        layout: "out_in" or "in_out", the order of the weight's first two axes.
        groups: The groups g of a convolution.
        view: The shape in which the weight is applied, if it differs from the weight's own.
        rows: The range of its outputs (start, stop), or None for all.
        order: The permutation of the weight's dimensions before the view.

    Returns:
        [out], in fp32, or fp64 for an fp64 weight.
    """
    if is_in_parts(a):
        return _gain_in_parts(magnitude, weight, a, b, scale, layout)
    check_not_in_parts(weight)
    applied = applied_weight(weight, layout, view, rows, order)
    norm = weight_norm(applied, a, b, scale, layout, groups)
    return _over_norm(magnitude, norm)


def dense_gain(magnitude: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return PEFT's gain for a grouped convolution whose A is dense, differentiable in m only.

    PEFT multiplies B, read as [out/g, r], with A, and reads the product in the shape of W. No layer computes
    that product, but PEFT trains with its norm.

    Args:
        magnitude: m, with ``out`` elements.
        weight: W, [out, in/g, *k].
        a: A, [r, in, *k].
        b: B, [out, r/g, 1, ...].
        scale: s.

    Returns:
        [out], in fp32, or fp64 for an fp64 weight.
    """
    return _over_norm(magnitude, dense_norm(weight, a, b, scale))


def dense_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norm of :func:`dense_gain`, [out], detached."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    base, down, up = (tensor.detach().to(wide) for tensor in (weight, a, b))
    product = (up.reshape(-1, len(a)) @ down.flatten(1)).reshape(base.shape)
    norm: Tensor = torch.linalg.vector_norm((base + scale * product).flatten(1), dim=1)
    return norm


def _over_norm(magnitude: Tensor, norm: Tensor) -> Tensor:
    magnitudes = magnitude.flatten().to(norm.dtype)
    if norm.device.type == "cpu" and _visible(norm) and norm.numel() and bool(norm.min() > 0):
        return magnitudes / norm
    # A division by infinity has a zero gradient, but `where` over m / 0 would have a gradient of NaN.
    is_zero = norm == 0
    return magnitudes / norm.masked_fill(is_zero, torch.inf) + is_zero


def _gain_in_parts(
    magnitude: Any, weight: Tensor, a: Any, b: Any, scale: float, layout: str
) -> Tensor:
    """Return the gain of a linear layer with sharded factors, a DTensor with the magnitude's placements."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        own = applied_weight(own_part(weight), layout)
        square = _squared_norm(own, own_part(a), own_part(b), scale, layout, 1)
        norm = _norm_of(summed_over_inputs(square, a))
    gains = _over_norm(magnitude.to_local(grad_placements=magnitude.placements), norm)
    return DTensor.from_local(
        gains,
        magnitude.device_mesh,
        magnitude.placements,
        run_check=False,
        shape=magnitude.shape,
        stride=magnitude.stride(),
    )


def applied_weight(
    weight: Tensor,
    layout: str = "out_in",
    view: Sequence[int] | None = None,
    rows: tuple[int, int] | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Return the detached weight in the layout in which it is applied.

    A dense weight is a view if its strides allow it. A quantized one is dequantized.

    Args:
        weight: The parameter.
        layout: "out_in" or "in_out", the order of its first two axes.
        view: The shape in which it is applied, if it differs from its own.
        rows: The range of its outputs (start, stop), or None for all.
        order: The permutation of its dimensions before the view, or None.
    """
    stored = quantization_of(weight)
    weight = weight.detach() if stored is None else dense(weight)
    if stored is not None and stored.stacked is None and layout == "in_out":
        weight = weight.T
    if order is not None:
        weight = weight.permute(tuple(order))
    if view is not None:
        weight = weight.reshape(view)
    if rows is None:
        return weight
    return weight.narrow(0 if layout == "out_in" else 1, rows[0], rows[1] - rows[0])


def held(gains: Tensor) -> Tensor:
    """Return the gains that the branch uses: detached if an output can be divided by each gain.

    With detached gains, :func:`rescaled` computes the gradient of the gains from its output. Otherwise it
    saves the base output.
    """
    if not gains.requires_grad or not torch.is_grad_enabled() or not divisible(gains):
        return gains
    return gains.detach()


def divisible(gains: Tensor) -> bool:
    """Return True if an output can be divided by every gain, because none is near 0.

    Reading the values synchronizes with a GPU. If they cannot be read (compilation, a CUDA graph, a transform
    of ``torch.func``), return False.
    """
    if not _visible(gains):
        return False
    # Without values, assume ordinary gains, so that the same tensors are saved.
    return gains.is_meta or not gains.numel() or not bool(gains.detach().abs().min() < _SMALLEST)


def scaled_b(b: Tensor, gains: Tensor, scale: float) -> Tensor:
    """Return ``s · g ∘ B``. Scaling B costs less than scaling the output of the branch.

    Args:
        b: [out, r] or [out, r, 1, ...].
        gains: [out].
        scale: s.
    """
    return b * (gains * scale).to(b.dtype).view(-1, *(1 for _ in b.shape[1:]))


def shifted(bias: Tensor | None, gains: Tensor, like: Tensor) -> Tensor | None:
    """Return ``(1 - g) ∘ bias``, a summand with which the gain does not scale the bias of the output.

    Return None if ``bias`` is None. Tensor parallelism may add the bias after the operation.
    """
    if bias is None:
        return None
    if is_in_parts(gains):
        gains = factor_beside(gains, like)
    # The same bits as (1 - g) ∘ bias, which torch.export of PyTorch 2.11 cannot decompose.
    return ((gains - 1) * -bias).to(like.dtype)


def rescaled(
    total: Tensor,
    base: Tensor | None,
    up: Tensor,
    gains: Tensor,
    constant: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``total + (g - 1) ∘ base + up``, which is ``g ∘ base + up`` for the first adapter.

    The gradient of g is a sum over ``base``, which is saved. If ``constant`` is from :func:`held`, ``base``
    is instead computed from a saved lazy copy of the result. The copy costs nothing if the next layer saves
    its input, as most activations do, and nothing writes into it.

    Args:
        total: The base output with the adapters before this one.
        base: The output of the base operation, or None for the first adapter, if it is ``total``.
        up: The branch, already with gain, scale and ``(1 - g) ∘ bias``.
        gains: g, in the shape of :func:`spread`.
        constant: The gains that the branch was computed with.
        bias: The base operation's bias, in a shape that broadcasts to the output.

    Returns:
        The output, in the dtype of ``total``.
    """
    up = up.to(total.dtype)
    if is_in_parts(gains):
        return _rescaled_in_parts(total, base, up, gains)
    if base is not None:
        return _with_product(total + up, base, (gains - 1).to(total.dtype))
    if constant is None or constant.requires_grad or not gains.requires_grad:
        return _combined(total, up, gains)
    if total.is_nested:
        out = _combined(total, up, constant)
        product = (out if bias is None else out - bias).detach()
        # This adds zero, and gives the gains their gradient.
        return _with_product(out, product, ((gains - constant) / constant).to(out.dtype))
    result: Tensor = _FromOutput.apply(total, up, gains, bias)  # type: ignore[no-untyped-call]
    return result


def recomputed(
    base: Tensor,
    up: Tensor,
    gains: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Do the same as :func:`rescaled` for a linear layer's first adapter, but recompute the base product.

    The backward costs one more product, and no memory, because the branch saves ``x`` anyway.
    """
    up = up.to(base.dtype)
    if is_in_parts(gains):
        return _rescaled_in_parts(base, None, up, gains)
    if not gains.requires_grad or not _visible(gains) or base.is_nested:
        return _combined(base, up, gains)
    result: Tensor = _FromInput.apply(base, up, gains, x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _rescaled_in_parts(total: Tensor, base: Tensor | None, up: Tensor, gains: Tensor) -> Tensor:
    """Do the same as :func:`rescaled` for sharded tensors. The base output is saved for the gain."""
    gains = factor_beside(gains, total)
    if not is_in_parts(total):
        return rescaled(total, base, up, gains)
    if base is None:
        return compute_in_parts(_combined, (total, up), gains)
    return compute_in_parts(rescaled, (total, base, up), gains)


def _visible(tensor: Tensor) -> bool:
    """Return True if Python may read values of a tensor, and save any tensor for the backward."""
    if torch.compiler.is_compiling() or transformed():
        return False
    # A fake tensor has no values, and other subclasses may handle theirs differently.
    if type(tensor) is not Tensor:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _combined(base: Tensor, up: Tensor, gains: Tensor) -> Tensor:
    if gains.dtype == base.dtype:
        return _with_product(up, base, gains)
    # A gain near 1 would lose its digits in a half type, but its difference from 1 does not.
    return _with_product(base + up, base, (gains - 1).to(base.dtype))


def _with_product(total: Tensor, base: Tensor, vector: Tensor) -> Tensor:
    """Return ``total + base ∘ vector``."""
    if not base.is_nested:
        return torch.addcmul(total, base, vector)
    if base.layout is not torch.jagged:
        raise LoraFxError(
            "DoRA scales the output features of an operation, and a nested tensor of layout torch.strided "
            "has no product with a vector: make it with layout=torch.jagged"
        )
    return total + base * vector


def times_gains(grad: Tensor, gains: Tensor, space: Tensor | None = None) -> Tensor:
    """Return a gradient times gains, rounded once if the gains have a wider dtype.

    Args:
        grad: The gradient.
        gains: g.
        space: A tensor that the result may overwrite, or None.
    """
    if gains.dtype == grad.dtype:
        return torch.mul(grad, gains, out=space)
    return torch.addcmul(grad, grad, (gains - 1).to(grad.dtype), out=space)


def _summed(product: Tensor, like: Tensor) -> Tensor:
    """Sum a product over the axes along which ``like`` is broadcast."""
    behind = product.dim() - like.dim()
    axes = [
        axis for axis in range(product.dim()) if axis < behind or like.shape[axis - behind] == 1
    ]
    total = product.sum(axes, dtype=like.dtype) if axes else product
    return total.reshape(like.shape)


class _FromOutput(torch.autograd.Function):
    """Autograd function of ``y = g ∘ base + up`` that saves y instead of the base output.

    The gradient of g is ``Σ dL/dy ∘ (y - bias) / g``.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, up: Tensor, gains: Tensor, bias: Tensor | None) -> Tensor:
        out = _combined(base, up, gains)
        ctx.save_for_backward(lazy_copy(out), gains, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The gain is a constant in the branch, so that second derivatives would be silently wrong.
            raise LoraFxError(
                "the gradient of DoRA cannot be differentiated again (create_graph=True): take first "
                "derivatives, or freeze the magnitudes (lora_magnitude_vector) for this step"
            )
        out, gains, bias = ctx.saved_tensors
        (grad,) = grads
        product = grad * (out if bias is None else out - bias)
        return times_gains(grad, gains), grad, _summed(product, gains) / gains, None


class _FromInput(torch.autograd.Function):
    """Autograd function of ``y = g ∘ base + up`` that computes the base output again in the backward.

    The gradient of g is ``Σ dL/dy ∘ base``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        up: Tensor,
        gains: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gains, x, weight, bias)
        return _combined(base, up, gains)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gains, x, weight, bias = ctx.saved_tensors
        (grad,) = grads
        # Autocast is off in a backward, but the base product may have run under it.
        bias = None if bias is None else bias.to(grad.dtype)
        base = F.linear(x.to(grad.dtype), weight.to(grad.dtype), bias)
        return times_gains(grad, gains), grad, _summed(grad * base, gains), None, None, None
