"""Weight-decomposed adapters at training time: ``y' = g ∘ x (W + s·BA)ᵀ + bias``, ``g = m / ‖W + s·BA‖``.

DoRA (Liu et al. 2024, arXiv:2402.09353) trains a magnitude m for each output feature beside the direction
that the factors turn. The norm is taken over all that a feature is a sum of, and is a constant for the
gradient (section 4.3). What is added to the base output y is ``(g - 1) ∘ (y - bias) + g ∘ s·x AᵀBᵀ``: no
second product with W. The gradient of m needs ``y - bias``, which no layer keeps: :func:`rescaled` and
:func:`recomputed` say where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.errors import LoraFxError
from lora_fx.formats.weights import dense, quantization_of
from lora_fx.runtime.dora_norm import weight_norm
from lora_fx.runtime.lazy_copy import lazy_copy
from lora_fx.runtime.masks import transformed

__all__ = [
    "applied_weight",
    "divisible",
    "gain",
    "held",
    "recomputed",
    "rescaled",
    "shifted",
    "spread",
    "steered",
    "weight_norm",
]

_SMALLEST = 2**-3  # a gain below that is not divided by


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
    """``g = m / ‖W + s·BA‖``, differentiable in m only.

    A feature whose weights are all zero has no direction, and no magnitude: its gain is 1, so that B can
    give it one (m / 0 would make the output NaN).

    Args:
        magnitude: m, with ``out`` elements.
        weight: W, the parameter.
        a: A, [r, in/g, *k].
        b: B, [out, r/g, 1, ...].
        scale: s.
        layout: How the weight is stored.
        groups: Of a convolution.
        view: The shape in which the weight is applied, where that is not its own.
        rows: Which of its outputs (start, stop).
        order: How the weight's dimensions are permuted before it is viewed.

    Returns:
        [out], in fp32, or fp64 for an fp64 weight.
    """
    applied = applied_weight(weight, layout, view, rows, order)
    norm = weight_norm(applied, a, b, scale, layout, groups)
    # The gradient of what is divided by infinity is zero; what `where` leaves out of m / 0 would have NaN.
    nothing = norm == 0
    return magnitude.flatten().to(norm.dtype) / norm.masked_fill(nothing, torch.inf) + nothing


def applied_weight(
    weight: Tensor,
    layout: str = "out_in",
    view: Sequence[int] | None = None,
    rows: tuple[int, int] | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    """The weight as it is applied: a view, or a copy where it is not contiguous and viewed otherwise.

    Args:
        weight: The parameter.
        layout: Which of its axes has the outputs.
        view: The shape in which it is applied, where that is not its own.
        rows: Which of its outputs (start, stop).
        order: How its dimensions are permuted before it is viewed; None for not at all.
    """
    if quantization_of(weight) is None:
        weight = weight.detach()
    else:
        weight = dense(weight) if layout == "out_in" else dense(weight).T
    if order is not None:
        weight = weight.permute(tuple(order))
    if view is not None:
        weight = weight.reshape(view)
    if rows is None:
        return weight
    return weight.narrow(0 if layout == "out_in" else 1, rows[0], rows[1] - rows[0])


def held(gains: Tensor) -> Tensor:
    """The gains as :func:`rescaled` wants them to work from its output: constants, if it can divide by each.

    Where it cannot, the result is ``gains`` itself, and :func:`rescaled` keeps the base output.
    """
    if not gains.requires_grad or not torch.is_grad_enabled() or not divisible(gains):
        return gains
    return gains.detach()


def divisible(gains: Tensor) -> bool:
    """Whether an output can be divided by every gain: whether none is near 0.

    Looking at the values waits for a GPU. Where nobody may look (compilation, a CUDA graph, a transform of
    ``torch.func``) the answer is no.
    """
    return _visible(gains) and not bool((gains.detach().abs() < _SMALLEST).any())


def steered(b: Tensor, gains: Tensor, scale: float) -> Tensor:
    """``s · g ∘ B``: the branch is scaled where it is small.

    Args:
        b: [out, r] or [out, r, 1, ...].
        gains: [out].
        scale: s.
    """
    return b * (gains * scale).to(b.dtype).view(-1, *(1 for _ in b.shape[1:]))


def shifted(bias: Tensor, gains: Tensor, like: Tensor) -> Tensor:
    """``(1 - g) ∘ bias``: what the gain takes off the bias in a base output, in the dtype of ``like``."""
    return ((1 - gains) * bias).to(like.dtype)


def spread(vector: Tensor, like: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A vector of the output features in the shape in which it meets an output.

    Args:
        vector: [out].
        like: The output. A matrix times a vector has its features where a product has its rows.
        axes: Where the features lie in an output, counted from its end.
        sizes: Their sizes, where they are several dimensions.

    Returns:
        A view with 1 for every other dimension behind the first of the axes.
    """
    if like.dim() < -min(axes):
        return vector
    if len(axes) > 1:
        order = sorted(range(len(axes)), key=lambda place: axes[place])
        vector = vector.view(tuple(sizes)).permute(order)
    kept = iter(vector.shape)
    first = min(axes)
    return vector.reshape([next(kept) if axis in axes else 1 for axis in range(first, 0)])


def rescaled(
    total: Tensor,
    base: Tensor | None,
    up: Tensor,
    gains: Tensor,
    constant: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``total + (g - 1) ∘ base + up``, which is ``g ∘ base + up`` for the first adapter.

    The gradient of g is a sum over ``base``. That is kept for it, or, if ``constant`` is :func:`held`, worked
    out from the result: a lazy copy of it, which costs nothing where the next layer keeps its input, as most
    activations do, and nobody writes into it.

    Args:
        total: The base output with the adapters before this one.
        base: What the base operation gives; None if that is ``total``, for the first adapter.
        up: The branch, gain, scale and ``(1 - g) ∘ bias`` in it already.
        gains: g, in the shape of :func:`spread`.
        constant: What the branch has for g.
        bias: The base operation's bias, as it meets the output.

    Returns:
        In the dtype of ``total``.
    """
    up = up.to(total.dtype)
    if base is not None:
        return _with_product(total + up, base, (gains - 1).to(total.dtype))
    if constant is None or constant.requires_grad or not gains.requires_grad:
        return _combined(total, up, gains)
    if total.is_nested:
        out = _combined(total, up, constant)
        product = (out if bias is None else out - bias).detach()
        # Nothing is added but a gradient.
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
    """As :func:`rescaled` for the first adapter of a linear layer, whose product is made again in backward.

    It costs one more product, and no memory: the branch keeps ``x`` anyway.
    """
    up = up.to(base.dtype)
    if not gains.requires_grad or not _visible(gains) or base.is_nested:
        return _combined(base, up, gains)
    result: Tensor = _FromInput.apply(base, up, gains, x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _visible(tensor: Tensor) -> bool:
    """Whether Python may look at values, and save what it likes."""
    if torch.compiler.is_compiling() or transformed() or tensor.is_meta:
        return False
    # A fake tensor has no values; what other subclasses do with them is their own.
    if type(tensor) is not Tensor:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _combined(base: Tensor, up: Tensor, gains: Tensor) -> Tensor:
    if gains.dtype == base.dtype:
        return _with_product(up, base, gains)
    # A gain near 1 would lose its digits in a half type; what it has more or less than 1 does not.
    return _with_product(base + up, base, (gains - 1).to(base.dtype))


def _with_product(total: Tensor, base: Tensor, vector: Tensor) -> Tensor:
    """``total + base ∘ vector``."""
    if not base.is_nested:
        return torch.addcmul(total, base, vector)
    if base.layout is not torch.jagged:
        raise LoraFxError(
            "DoRA scales the output features of an operation, and a nested tensor of layout torch.strided "
            "has no product with a vector: make it with layout=torch.jagged"
        )
    return total + base * vector


def _scaled(grad: Tensor, gains: Tensor) -> Tensor:
    if gains.dtype == grad.dtype:
        return grad * gains
    return torch.addcmul(grad, grad, (gains - 1).to(grad.dtype))


def _summed(product: Tensor, like: Tensor) -> Tensor:
    """The sum over all that ``like`` is broadcast along."""
    behind = product.dim() - like.dim()
    axes = [
        axis for axis in range(product.dim()) if axis < behind or like.shape[axis - behind] == 1
    ]
    total = product.sum(axes, dtype=like.dtype) if axes else product
    return total.reshape(like.shape)


class _FromOutput(torch.autograd.Function):
    """``y = g ∘ base + up``; ``dL/dg = Σ dL/dy ∘ (y - bias) / g``."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, up: Tensor, gains: Tensor, bias: Tensor | None) -> Tensor:
        out = _combined(base, up, gains)
        ctx.save_for_backward(lazy_copy(out), gains, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The branch has the gain as a constant: second derivatives would be wrong without a word.
            raise LoraFxError(
                "the gradient of DoRA cannot be differentiated again (create_graph=True): take first "
                "derivatives, or freeze the magnitudes (lora_magnitude_vector) for this step"
            )
        out, gains, bias = ctx.saved_tensors
        (grad,) = grads
        product = grad * (out if bias is None else out - bias)
        return _scaled(grad, gains), grad, _summed(product, gains) / gains, None


class _FromInput(torch.autograd.Function):
    """``y = g ∘ base + up``; ``dL/dg = Σ dL/dy ∘ base``, and the base product is made again."""

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
        # Autocast is off in a backward, and the base product may have been made under it.
        bias = None if bias is None else bias.to(grad.dtype)
        base = F.linear(x.to(grad.dtype), weight.to(grad.dtype), bias)
        return _scaled(grad, gains), grad, _summed(grad * base, gains), None, None, None
