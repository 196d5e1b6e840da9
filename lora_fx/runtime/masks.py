"""Dropout masks that cost little to draw and to keep: one bit for each element.

PyTorch on a CPU draws one number for each element, which takes longer than a skinny product, and selects by
a mask of bytes ten times slower than it multiplies. Here 64 elements share each random word, as bit slices:
the numbers that are compared with the probability are never laid out.

Inductor on a CPU draws one number for each element as well, without vector instructions. It gets the same
words from an operator, ``lora_fx::mask_bits``, in an order in which it reads them with vector instructions:
a byte has the bits of eight elements that are an eighth of a row apart (*planes*). The operator is a function
of a number that the compiled code draws by itself: a compiler knows what to do with random numbers of
PyTorch's, which it must not take for one, and has to draw once more alike for a checkpoint.

On a GPU with Triton a mask is a *seed*: the kernels of :mod:`lora_fx.runtime.kernels` draw what they read.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.parts import is_in_parts

__all__ = [
    "FEW",
    "KERNEL_DEVICES",
    "KERNEL_RANKS",
    "draw",
    "dropped",
    "has_kernels",
    "in_planes",
    "kept",
    "masked",
    "masked_again",
    "recovery",
    "seed_of",
    "transformed",
    "unpacked",
]

# Elements below which a mask is drawn one by one: measured, with what reads it.
FEW = 8192

# Kinds of devices that kernels run on; in Triton's interpreter that may be a CPU.
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a tile of all ranks leaves of a GPU's registers.
KERNEL_RANKS = 256

_log = logging.getLogger("lora_fx")


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

    Elsewhere, in ``torch.export`` and under the transforms of ``torch.func`` it is PyTorch's own.

    Args:
        x: Of any shape.
        dropout: The probability with which an element becomes zero; see :func:`kept`.
        training: Whether there is dropout now.
    """
    if not (training and dropout):
        return x
    if is_in_parts(x):
        return _dropped_parts(x, dropout)
    if x.layout is not torch.strided or _takes_planes(x):
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
    like = torch_private.local_tensor(x).new_empty(()).expand(x.shape)
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
        On a CPU the bits of what is dropped: [ceil(n / 8)], uint8, and under a compiler planes, int8, which
        :func:`in_planes` tells apart. On a GPU with Triton a seed, a number of int64. Elsewhere, and in
        ``torch.export``, what is kept: bool in the shape of ``x``. The same under the transforms of
        ``torch.func``, where each sample of a batch may have a mask of its own, and for small tensors.
    """
    threshold = 256 - kept(dropout)
    if 0 < threshold < 256 and _takes_seed(x):
        # One number says all of a mask, and the device need not be waited for: seed · 256 + threshold.
        return torch.randint(2**55, (), device=x.device).mul_(256).add_(threshold)
    if _takes_planes(x):
        if threshold in (0, 256):
            return torch.full(x.shape, not threshold, dtype=torch.bool, device=x.device)
        # The generator takes no more than 32 bits.
        seed = torch.randint(2**32, (), dtype=torch.int64, device=x.device)
        rows, columns = math.prod(x.shape[:-1]), (x.shape[-1] + 7) // 8
        planes: Tensor = torch.ops.lora_fx.mask_bits(seed, rows, columns, threshold)
        return planes
    if torch.compiler.is_compiling() or x.device.type != "cpu" or transformed() or _few(x):
        return torch.rand(x.shape, device=x.device) >= threshold / 256
    if threshold in (0, 256):
        everything = 255 if threshold else 0
        return torch.full(((x.numel() + 7) // 8,), everything, dtype=torch.uint8, device=x.device)
    return _bits((x.numel() + 7) // 8, threshold, x.device)


def _bits(
    count: int, threshold: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Bytes of bits that are 1 with the probability ``threshold / 256``, uint8 [count]."""
    # Bit by bit from the lowest that is set, the number below the threshold: an element is dropped with the
    # probability 0.b7 b6 ... b0 in binary.
    digits = [digit == "1" for digit in reversed(f"{threshold:08b}")]
    digits = digits[digits.index(True) :]
    # With its device, since torch.set_default_device may name another one.
    words = torch.empty(len(digits), (count + 7) // 8, dtype=torch.int64, device=device)
    # All 64 bits: from the lowest number, with no upper end.
    words.random_(-(2**63), None, generator=generator)
    dropped = words[0]
    for digit, word in zip(digits[1:], words[1:], strict=True):
        if digit:
            dropped |= word
        else:
            dropped &= word
    # A copy, so that the other words are not kept.
    return dropped.view(torch.uint8)[:count].clone()


torch.library.define(
    "lora_fx::mask_bits", "(Tensor seed, SymInt rows, SymInt columns, int threshold) -> Tensor"
)


@torch.library.impl("lora_fx::mask_bits", "CPU")
def _planes(seed: Tensor, rows: int, columns: int, threshold: int) -> Tensor:
    """Planes for rows of ``8 * columns`` elements, [rows, columns], int8.

    Args:
        seed: A number.
        rows: Of the tensor.
        columns: Bytes of a row: bit k of byte j belongs to element ``k * columns + j``.
        threshold: As for :func:`_bits`.
    """
    generator = torch.Generator("cpu").manual_seed(int(seed))
    found = _bits(rows * columns, threshold, seed.device, generator)
    return found.view(torch.int8).view(rows, columns)


@torch.library.register_fake("lora_fx::mask_bits")  # type: ignore[untyped-decorator]
def _fake_planes(seed: Tensor, rows: int, columns: int, threshold: int) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.int8)


def _takes_planes(x: Tensor) -> bool:
    """Whether a mask is drawn for a compiler that makes code for a CPU."""
    return (
        torch.compiler.is_compiling()
        and not torch_private.in_export()
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dim() > 0
        and not transformed()
    )


def _takes_seed(x: Tensor) -> bool:
    """Whether kernels draw and read the mask of a tensor."""
    return (
        not torch.compiler.is_compiling()
        and not transformed()
        and x.device.type in KERNEL_DEVICES
        and x.dtype in _KERNEL_DTYPES
        and x.layout is torch.strided
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and has_kernels(x.device)
    )


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of :mod:`lora_fx.runtime.kernels` run on a device, and are right there.

    They need Triton and a GPU of compute capability 8.0 (Ampere). Where there are both and they do not run,
    the log says why, and masks and products are PyTorch's.

    Args:
        device: Its kind is one of ``KERNEL_DEVICES``.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    with torch_private.disable_dispatch_modes(), torch.inference_mode(False), torch.no_grad():
        problem = _problem(device)
    if problem:
        _log.warning("dropout on %s does without lora-fx's kernels: %s", device, problem)
    return not problem


def _problem(device: torch.device) -> str:
    try:
        from lora_fx.runtime import kernels
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return kernels.check(device)


def seed_of(mask: Tensor | None, a: Tensor) -> Tensor | None:
    """A mask, if kernels read it in their products with a factor; otherwise None.

    Args:
        mask: Of :func:`draw`, or None.
        a: A, [r, in].
    """
    read = mask is not None and _is_seed(mask) and a.shape[0] <= KERNEL_RANKS
    return mask if read else None


def _is_seed(mask: Tensor) -> bool:
    return mask.dtype == torch.int64


def in_planes(mask: Tensor) -> bool:
    """Whether a mask of :func:`draw` is planes, for a compiler."""
    return mask.dtype == torch.int8


def _kept_planes(mask: Tensor, backward: bool) -> Tensor:
    """What planes keep, bool [rows, 8, columns].

    Args:
        mask: Planes.
        backward: Whether it is read in a backward. A compiler that finds one expression in the forward and
            in the backward keeps its value, which is eight times the planes, and reads it more slowly: so
            there are two.
    """
    # Wider than a byte: inductor has no vector instructions for shifts of bytes.
    bits = mask.int()[:, None]
    places = torch.arange(8, dtype=torch.int32, device=mask.device)[:, None]
    return (bits << (31 - places)) >= 0 if backward else (bits & (1 << places)) == 0


def _times_planes(x: Tensor, mask: Tensor, backward: bool = False) -> Tensor:
    if not _fits(x):
        kept = _kept_planes(mask, backward).flatten(1)[:, : x.shape[-1]]
        return x * kept.reshape(x.shape)
    apart = x.reshape(mask.shape[0], 8, mask.shape[1])
    return (apart * _kept_planes(mask, backward)).reshape(x.shape)


class _TimesPlanes(torch.autograd.Function):
    """What a compiler sees outside of other functions of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _times_planes(x, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _times_planes(grads[0], mask, backward=True), None


def _fits(x: Tensor) -> bool:
    """Whether a row is eight planes without a rest, for all sizes that a compiler has in mind."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.shape[-1] % 8 == 0)


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
    if _is_seed(mask):
        columns = x.shape[-1] if x.dim() else 1
        matrix: Tensor = torch.ops.lora_fx.dropout_mask(mask, x.numel() // columns, columns)
        return matrix.view(x.shape)
    if in_planes(mask):
        return _kept_planes(mask, False).flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    # A table made under a FakeTensorMode has no values, and must not be found by those who come after.
    make = _rows if type(mask) is Tensor else _rows.__wrapped__
    rows = torch.index_select(make(x.dtype), 0, mask.int())
    return rows.flatten()[: x.numel()].view(x.shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` without what a mask drops, not scaled: of a sparse tensor, numbers that it holds."""
    if in_planes(mask):
        if not (torch.is_grad_enabled() and x.requires_grad):
            # Dynamo does not trace a function that has no gradient to compute.
            return _times_planes(x, mask)
        out: Tensor = _TimesPlanes.apply(x, mask)  # type: ignore[no-untyped-call]
        return out
    if x.layout not in (torch.strided, torch.sparse_coo):
        # What else is sparse has no product with a dense tensor, or not on every device.
        x = x.to_sparse(layout=torch.sparse_coo)
    return x * unpacked(mask, x)


def masked_again(x: Tensor, mask: Tensor, total: Tensor | None = None) -> Tensor:
    """``total + masked(x, mask)`` in a backward, where ``mask`` is in planes."""
    if total is None or not _fits(x):
        found = _times_planes(x, mask, backward=True)
        return found if total is None else total + found
    shape = (mask.shape[0], 8, mask.shape[1])
    product = x.reshape(shape) * _kept_planes(mask, True)
    return (total.reshape(shape) + product).reshape(x.shape)


def _few(x: Tensor) -> bool:
    """Whether a number for each element costs less than the calls that bits take."""
    return x.numel() < FEW


def transformed() -> bool:
    """Whether plain operations are called for: ``torch.func``, forward-mode AD or ``torch.jit.trace``.

    Also while Dynamo traces a transform. A function of autograd would be an opaque node of a recorded trace.
    """
    transform = torch_private.in_functorch() or torch_private.in_forward_ad()
    return transform or torch_private.in_jit_trace()


# What torch.compiler.assume_constant_result sets; the decorator itself imports Dynamo, which takes seconds.
torch_private.make_constant(transformed)


@functools.cache
def _rows(dtype: torch.dtype) -> Tensor:
    """For each byte its eight bits, lowest first: 1 where the bit is 0."""
    # A tensor made under inference mode could not be used outside of it.
    with torch.inference_mode(False):
        bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
        return (1 - bits).to(dtype)
