"""Dropout masks that cost little to draw and to keep: one bit for each element.

PyTorch on a CPU draws one number for each element, which takes longer than a skinny product, and selects by
a mask of bytes ten times slower than it multiplies. Here 64 elements share each random word, as bit slices:
the numbers that are compared with the probability are never laid out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_fx.errors import ConfigError
from lora_fx.runtime.parts import is_in_parts

__all__ = ["FEW", "draw", "dropped", "kept", "masked", "recovery", "transformed", "unpacked"]

# Elements below which a mask is drawn one by one: measured, with what reads it.
FEW = 8192


def kept(dropout: Any) -> int:
    """How many of 256 elements a mask keeps on average.

    A mask compares random numbers of eight bits with a threshold, so that probabilities are multiples of
    1/256: ``dropout`` is rounded to the nearest one from 1/256 to 255/256, so that it neither keeps nor drops
    everything (0.0001 becomes 0.0039); only 0 and 1 themselves do.

    Args:
        dropout: A probability.

    Raises:
        ConfigError: If it is none.
    """
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ConfigError(
            f"lora_dropout: p is {dropout!r}; a probability is at least 0 and at most 1"
        )
    if dropout in (0, 1):
        return 0 if dropout else 256
    return 256 - min(max(round(dropout * 256), 1), 255)


def recovery(dropout: float) -> float:
    """The factor of what a mask keeps, so that the mean is exact; 0 if it keeps nothing.

    Args:
        dropout: As for :func:`kept`.
    """
    count = kept(dropout)
    return 256 / count if count else 0.0


def dropped(x: Tensor, dropout: float, training: bool) -> Tensor:
    """``torch.nn.functional.dropout`` for a CPU: the mask is drawn by :func:`draw`, and kept as bits.

    Elsewhere, under a compiler and under the transforms of ``torch.func`` it is PyTorch's own.

    Args:
        x: Of any shape.
        dropout: The probability with which an element becomes zero; see :func:`kept`.
        training: Whether there is dropout now.
    """
    if not (training and dropout):
        return x
    if is_in_parts(x):
        return _dropped_parts(x, dropout)
    if x.layout is not torch.strided:
        return masked(x, draw(x, dropout)) * recovery(dropout)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or transformed():
        return F.dropout(x, dropout)
    out: Tensor = _Dropped.apply(x, draw(x, dropout), recovery(dropout))  # type: ignore[no-untyped-call]
    return out


def _dropped_parts(x: Any, dropout: float) -> Tensor:
    """Dropout of a tensor in parts: the part of one mask for the whole.

    Processes that draw alike (the same ``torch.manual_seed``) have the mask that one process would have.

    Args:
        x: In parts.
        dropout: The probability with which an element becomes zero; see :func:`lora_fx.runtime.masks.kept`.
    """
    from torch.distributed.tensor import distribute_tensor

    if torch.compiler.is_compiling() or any(one.is_partial() for one in x.placements):
        return F.dropout(x, dropout)
    like = x._local_tensor.new_empty(()).expand(x.shape)
    mask = unpacked(draw(like, dropout), like).to(x.dtype)
    parts = distribute_tensor(mask, x.device_mesh, x.placements, src_data_rank=None)
    out: Tensor = x * parts * recovery(dropout)
    return out


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        # Scaled afterwards: a half-precision factor would round the scale.
        return (x * unpacked(mask, x)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (mask,) = grads, ctx.saved_tensors
        return (grad * unpacked(mask, grad)).mul_(ctx.scale), None, None


def draw(x: Tensor, dropout: float) -> Tensor:
    """Draws a mask from the default generator of the device of ``x``.

    ``torch.manual_seed`` repeats it, and so does a checkpointed block.

    Args:
        x: A tensor of the shape of the mask.
        dropout: The probability with which an element is dropped; see :func:`kept`.

    Returns:
        On a CPU the bits of what is dropped [ceil(n / 8)], uint8. Elsewhere, and under a compiler, which both
        fuse a mask with what reads it, what is kept: bool in the shape of ``x``. The same under the
        transforms of ``torch.func``, where each sample of a batch may have a mask of its own, and for small
        tensors.
    """
    threshold = 256 - kept(dropout)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or transformed() or _few(x):
        return torch.rand(x.shape, device=x.device) >= threshold / 256
    if threshold in (0, 256):
        everything = 255 if threshold else 0
        return torch.full(((x.numel() + 7) // 8,), everything, dtype=torch.uint8, device=x.device)
    # Bit by bit from the lowest that is set, the number below the threshold: an element is dropped with the
    # probability 0.b7 b6 ... b0 in binary.
    digits = [digit == "1" for digit in reversed(f"{threshold:08b}")]
    digits = digits[digits.index(True) :]
    # With its device, since torch.set_default_device may name another one.
    words = torch.empty(len(digits), (x.numel() + 63) // 64, dtype=torch.int64, device=x.device)
    # All 64 bits: from the lowest number, with no upper end.
    words.random_(-(2**63), None)
    dropped = words[0]
    for digit, word in zip(digits[1:], words[1:], strict=True):
        if digit:
            dropped |= word
        else:
            dropped &= word
    # A copy, so that the other words are not kept.
    return dropped.view(torch.uint8)[: (x.numel() + 7) // 8].clone()


def unpacked(mask: Tensor, x: Tensor) -> Tensor:
    """What to multiply ``x`` with to drop what a mask drops.

    Args:
        mask: Of :func:`draw`.
        x: A tensor of the shape for which it was drawn.

    Returns:
        0 or 1 in the shape of ``x``: in its dtype from bits, otherwise bool.
    """
    if mask.dtype == torch.bool:
        return mask.view(x.shape)
    # A table made under a FakeTensorMode has no values, and must not be found by those who come after.
    make = _rows if type(mask) is Tensor else _rows.__wrapped__
    rows = torch.index_select(make(x.dtype), 0, mask.int())
    return rows.flatten()[: x.numel()].view(x.shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` without what a mask drops, not scaled: of a sparse tensor, numbers that it holds."""
    if x.layout not in (torch.strided, torch.sparse_coo):
        # What else is sparse has no product with a dense tensor, or not on every device.
        x = x.to_sparse(layout=torch.sparse_coo)
    return x * unpacked(mask, x)


def _few(x: Tensor) -> bool:
    """Whether a number for each element costs less than the calls that bits take."""
    return x.numel() < FEW


def transformed() -> bool:
    """Whether plain operations are called for: ``torch.func``, forward-mode AD or ``torch.jit.trace``.

    Also while Dynamo traces a transform. A function of autograd would be an opaque node of a recorded trace.
    """
    transform = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transform or torch._C._is_tracing()


# What torch.compiler.assume_constant_result sets; the decorator itself imports Dynamo, which takes seconds.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _rows(dtype: torch.dtype) -> Tensor:
    """For each byte its eight bits, lowest first: 1 where the bit is 0."""
    # A tensor made under inference mode could not be used outside of it.
    with torch.inference_mode(False):
        bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
        return (1 - bits).to(dtype)
