"""A linear operation and its LoRA branch as one function: ``y = x Wᵀ + bias + s · (drop(x) Aᵀ) Bᵀ``.

The branch is added in place (``addmm_``): nothing of the size tokens × features is made for it, forward or
backward, but where dropout needs a masked input. For the backward pass it keeps x, the product with A
([tokens, r]) and, under dropout, one bit for each element of x. Autograd over the plain operations keeps the
masked input and its mask instead, and makes four more passes over the output.

Operations that share x have one product with all their A's, forward and backward, and one gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_fx.runtime.fused_branch import Rows, applied
from lora_fx.runtime.fused_calls import autocast_dtype, cast

__all__ = ["lora_linear", "lora_linears"]


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
        LoraFxError: In a second backward pass, where A is frozen and both x and B want a gradient.
    """
    dropout = dropout if training else 0.0
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
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = cast(x, dtype)
        # Weights and biases; factors are cast inside, so that they are saved as they are.
        tensors = [
            cast(one, dtype) if one is not None and place % 4 < 2 else one
            for place, one in enumerate(tensors)
        ]
    return applied(x, dropout, tuple((*one, None) for one in options), tensors, x.dtype)
