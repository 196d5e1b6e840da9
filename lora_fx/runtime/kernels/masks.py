"""Dropout masks that are cheap to draw and to save: one bit per element.

On a CPU, PyTorch draws one number per element, which takes longer than a skinny product. It also selects by a
mask of bytes ten times slower than it multiplies. Here, 64 elements share each random word, as bit slices.
The numbers that are compared with the probability never exist in memory.

Inductor on a CPU also draws one number per element, without vector instructions. Compiled code gets the same
words from an operator, ``lora_fx::mask_bits``, in an order that vector instructions can read. A byte has the
bits of eight elements that are an eighth of a row apart (*planes*). The operator is a function of a seed that
the compiled code draws with PyTorch's generator. A compiler handles such draws: it does not merge two of
them, and repeats them for a checkpoint.

On a GPU with Triton, a mask is a *seed*, from which the kernels of
:mod:`lora_fx.runtime.kernels.triton_kernels` draw bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.modules import is_in_parts

__all__ = [
    "FEW",
    "KERNEL_DEVICES",
    "KERNEL_RANKS",
    "TileMasks",
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

# Masks with fewer elements are drawn element by element. Measured, including the code that reads the mask.
FEW = 8192

# Types of devices that kernels run on. Triton's interpreter allows a CPU, too.
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The largest rank whose tile fits into a GPU's registers.
KERNEL_RANKS = 256

_log = logging.getLogger("lora_fx")


def kept(dropout: Any) -> int:
    """Return how many of 256 elements a mask keeps on average.

    A mask compares random numbers of eight bits with a threshold, so probabilities are multiples of 1/256.
    ``dropout`` is rounded to the nearest multiple from 1/256 to 255/256 (0.0001 becomes 0.0039). Only 0 and 1
    themselves keep or drop everything.

    Args:
        dropout: A probability.

    Raises:
        ConfigError: If ``dropout`` is not a number from 0 to 1.
    """
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ConfigError(
            f"lora_dropout: p is {dropout!r}; a probability is at least 0 and at most 1"
        )
    if dropout in (0, 1):
        return 0 if dropout else 256
    return 256 - min(max(round(dropout * 256), 1), 255)


def recovery(dropout: float) -> float:
    """Return the scale of the elements that a mask keeps, so that the mean is exact; 0 if it keeps none.

    Args:
        dropout: A probability, see :func:`kept`.
    """
    count = kept(dropout)
    return 256 / count if count else 0.0


def dropped(x: Tensor, dropout: float, training: bool) -> Tensor:
    """Apply dropout like ``torch.nn.functional.dropout``. On a CPU, :func:`draw` draws a mask of bits.

    PyTorch's own dropout runs on other devices, in ``torch.export`` and under ``torch.func`` transforms.

    Args:
        x: A tensor of any shape.
        dropout: Probability that an element becomes zero, see :func:`kept`.
        training: True if dropout is active.
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
    """Apply dropout to a ``DTensor``, with the local part of one mask for the whole tensor.

    Ranks with the same random state (``torch.manual_seed``) get the mask that a single process would draw.

    Args:
        x: A ``DTensor``.
        dropout: Probability that an element becomes zero, see :func:`kept`.
    """
    from torch.distributed.tensor import distribute_tensor

    if torch.compiler.is_compiling() or any(placement.is_partial() for placement in x.placements):
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
        # Scaled afterwards, because a half-precision mask would round the scale.
        return (x * unpacked(mask, x)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (mask,) = grads, ctx.saved_tensors
        return (grad * unpacked(mask, grad)).mul_(ctx.scale), None, None


class TileMasks:
    """Masks of a module that runs in tiles of tokens, drawn for all tokens at once.

    Each tile gets its rows of the masks that the module would draw without tiles. Other masks, such as those
    of the tokens of an expert, are drawn by each tile.

    Attributes:
        total: Number of tokens.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._rows = slice(0, 0)
        self._wholes: list[Tensor] = []
        self._drawn = 0

    @contextlib.contextmanager
    def tile(self, rows: slice) -> Iterator[None]:
        """Draw the masks of some tokens inside of the block. ``rows`` starts at a multiple of 8."""
        self._rows, self._drawn = slice(rows.start, min(rows.stop, self.total)), 0
        token = _tiles.set(self)
        try:
            yield
        finally:
            _tiles.reset(token)

    def mask(self, x: Tensor, dropout: float) -> Tensor | None:
        """Return the part of the next mask that belongs to the tile, or None if the tile draws its own."""
        start, stop = self._rows.start, self._rows.stop
        if x.shape[:-1].numel() != stop - start or _takes_seed(x):
            return None
        if self._drawn == len(self._wholes):
            like = x.new_empty(()).expand(self.total, x.shape[-1])
            self._wholes.append(_mask_of(like, dropout))
        whole = self._wholes[self._drawn]
        self._drawn += 1
        if whole.dtype == torch.bool:
            return whole[start:stop].reshape(x.shape)
        return whole[start * x.shape[-1] // 8 : (stop * x.shape[-1] + 7) // 8]


_tiles: ContextVar[TileMasks | None] = ContextVar("lora_fx_tile_masks", default=None)


def draw(x: Tensor, dropout: float) -> Tensor:
    """Draw a mask from the default generator of the device of ``x``.

    ``torch.manual_seed`` and activation checkpointing repeat the mask.

    Args:
        x: A tensor with the shape of the mask.
        dropout: Probability that an element is dropped, see :func:`kept`.

    Returns:
        On a CPU, bits that are 1 for dropped elements: uint8 [ceil(n / 8)], or planes (int8, see
        :func:`in_planes`) under a compiler. On a GPU with Triton, a seed: an int64 scalar. Otherwise bool in
        the shape of ``x``, True for kept elements. A bool mask is also drawn for ``torch.export``, for small
        tensors on a CPU, and under ``torch.func``, where each sample of a batch may have its own mask.
    """
    masks = None if torch.compiler.is_compiling() else _tiles.get()
    part = None if masks is None else masks.mask(x, dropout)
    return _mask_of(x, dropout) if part is None else part


def _mask_of(x: Tensor, dropout: float) -> Tensor:
    threshold = 256 - kept(dropout)
    if 0 < threshold < 256 and _takes_seed(x):
        # One scalar encodes the mask without a synchronization of the device: seed · 256 + threshold.
        return torch.randint(2**55, (), device=x.device).mul_(256).add_(threshold)
    if _takes_planes(x):
        if threshold in (0, 256):
            return torch.full(x.shape, not threshold, dtype=torch.bool, device=x.device)
        # The generator supports only 32 bits.
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
    """Return bytes whose bits are 1 with the probability ``threshold / 256``, uint8 [count]."""
    # Compares each random number with the threshold bit by bit, from the lowest bit of the threshold that is
    # set. An element is dropped with the probability 0.b7 b6 ... b0 in binary.
    digits = [digit == "1" for digit in reversed(f"{threshold:08b}")]
    digits = digits[digits.index(True) :]
    # The device is explicit, because torch.set_default_device may have set another one.
    words = torch.empty(len(digits), (count + 7) // 8, dtype=torch.int64, device=device)
    # All 64 bits are random: the range starts at the least int64 and has no upper bound.
    words.random_(-(2**63), None, generator=generator)
    dropped = words[0]
    for digit, word in zip(digits[1:], words[1:], strict=True):
        if digit:
            dropped |= word
        else:
            dropped &= word
    # Copied, so that the memory of the other words is freed.
    return dropped.view(torch.uint8)[:count].clone()


torch.library.define(
    "lora_fx::mask_bits", "(Tensor seed, SymInt rows, SymInt columns, int threshold) -> Tensor"
)


@torch.library.impl("lora_fx::mask_bits", "CPU")
def _planes(seed: Tensor, rows: int, columns: int, threshold: int) -> Tensor:
    """Draw planes for rows of ``8 * columns`` elements, [rows, columns], int8.

    Args:
        seed: A scalar.
        rows: Number of rows of the tensor.
        columns: Bytes of a row. Bit k of byte j belongs to element ``k * columns + j``.
        threshold: Probability in units of 1/256, see :func:`_bits`.
    """
    generator = torch.Generator("cpu").manual_seed(int(seed))
    bits = _bits(rows * columns, threshold, seed.device, generator)
    return bits.view(torch.int8).view(rows, columns)


@torch.library.register_fake("lora_fx::mask_bits")  # type: ignore[untyped-decorator]
def _fake_planes(seed: Tensor, rows: int, columns: int, threshold: int) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.int8)


def _takes_planes(x: Tensor) -> bool:
    """Return True if the mask of a tensor is drawn as planes: in code that is compiled for a CPU."""
    return (
        torch.compiler.is_compiling()
        and not torch_private.in_export()
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.dim() > 0
        and not transformed()
    )


def _takes_seed(x: Tensor) -> bool:
    """Return True if the mask of a tensor is a seed, from which Triton kernels draw the bits."""
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
    """Return True if the kernels of :mod:`lora_fx.runtime.kernels.triton_kernels` run correctly on a device.

    They need Triton and a GPU of compute capability 8.0 (Ampere). If both are present and the kernels fail,
    log the reason. Masks and products then use PyTorch.

    Args:
        device: A device whose type is in ``KERNEL_DEVICES``.
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
        from lora_fx.runtime.kernels import triton_kernels
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return triton_kernels.check(device)


def seed_of(mask: Tensor | None, a: Tensor) -> Tensor | None:
    """Return the mask if kernels read it in their products with a factor, otherwise None.

    Args:
        mask: A mask of :func:`draw`, or None.
        a: The factor A, [r, in].
    """
    read = mask is not None and _is_seed(mask) and a.shape[0] <= KERNEL_RANKS
    return mask if read else None


def _is_seed(mask: Tensor) -> bool:
    return mask.dtype == torch.int64


def in_planes(mask: Tensor) -> bool:
    """Return True if a mask of :func:`draw` consists of planes, which compiled code reads."""
    return mask.dtype == torch.int8


def _kept_planes(mask: Tensor, backward: bool) -> Tensor:
    """Unpack planes to a mask that is True for kept elements, bool [rows, 8, columns].

    Args:
        mask: The planes.
        backward: True if a backward reads the mask. It uses a different expression than the forward.
            Otherwise a compiler would save the common value, which has eight times the size of the planes
            and is slower to read.
    """
    # Wider than a byte, because inductor has no vector instructions for shifts of bytes.
    bits = mask.int()[:, None]
    shifts = torch.arange(8, dtype=torch.int32, device=mask.device)[:, None]
    return (bits << (31 - shifts)) >= 0 if backward else (bits & (1 << shifts)) == 0


def _times_planes(x: Tensor, mask: Tensor, backward: bool = False) -> Tensor:
    if not _fits(x):
        kept = _kept_planes(mask, backward).flatten(1)[:, : x.shape[-1]]
        return x * kept.reshape(x.shape)
    apart = x.reshape(mask.shape[0], 8, mask.shape[1])
    return (apart * _kept_planes(mask, backward)).reshape(x.shape)


class _TimesPlanes(torch.autograd.Function):
    """Product of a tensor and a mask in planes, for compiled code outside of other autograd functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _times_planes(x, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _times_planes(grads[0], mask, backward=True), None


def _fits(x: Tensor) -> bool:
    """Return True if each row of a tensor has a multiple of 8 elements, so that its mask can be planes.

    Under a compiler, this holds for all sizes that the compiler assumes.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.shape[-1] % 8 == 0)


def unpacked(mask: Tensor, x: Tensor) -> Tensor:
    """Unpack a mask to a multiplier of ``x``.

    Args:
        mask: A mask of :func:`draw`.
        x: A tensor of the shape for which the mask was drawn.

    Returns:
        0 or 1 for each element of ``x``: in its dtype if the mask is bits, otherwise bool.
    """
    if mask.dtype == torch.bool:
        return mask.view(x.shape)
    if _is_seed(mask):
        columns = x.shape[-1] if x.dim() else 1
        matrix: Tensor = torch.ops.lora_fx.dropout_mask(mask, x.numel() // columns, columns)
        return matrix.view(x.shape)
    if in_planes(mask):
        return _kept_planes(mask, False).flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    # Under a FakeTensorMode the table has no values, and must not enter the cache.
    make = _rows if type(mask) is Tensor else _rows.__wrapped__
    rows = torch.index_select(make(x.dtype), 0, mask.int())
    return rows.flatten()[: x.numel()].view(x.shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Zero the elements of ``x`` that a mask drops, without scaling. ``x`` may be sparse."""
    if in_planes(mask):
        if not (torch.is_grad_enabled() and x.requires_grad):
            # Dynamo does not trace an autograd function that computes no gradient.
            return _times_planes(x, mask)
        out: Tensor = _TimesPlanes.apply(x, mask)  # type: ignore[no-untyped-call]
        return out
    if x.layout not in (torch.strided, torch.sparse_coo):
        # Other sparse layouts have no product with a dense tensor, or not on every device.
        x = x.to_sparse(layout=torch.sparse_coo)
    return x * unpacked(mask, x)


def masked_again(x: Tensor, mask: Tensor, total: Tensor | None = None) -> Tensor:
    """Return ``total + masked(x, mask)`` in a backward, for a mask in planes."""
    if total is None or not _fits(x):
        masked_x = _times_planes(x, mask, backward=True)
        return masked_x if total is None else total + masked_x
    shape = (mask.shape[0], 8, mask.shape[1])
    product = x.reshape(shape) * _kept_planes(mask, True)
    return (total.reshape(shape) + product).reshape(x.shape)


def _few(x: Tensor) -> bool:
    """Return True for a small tensor, whose mask is drawn faster with a number per element than as bits."""
    return x.numel() < FEW


def transformed() -> bool:
    """Return True under ``torch.func``, forward-mode AD or ``torch.jit.trace``, which need plain operations.

    This includes a transform that Dynamo traces. In a recorded trace, an autograd function would be an opaque
    node.
    """
    transform = torch_private.in_functorch() or torch_private.in_forward_ad()
    return transform or torch_private.in_jit_trace()


# Same effect as torch.compiler.assume_constant_result, which would import Dynamo and take seconds.
torch_private.make_constant(transformed)


@functools.cache
def _rows(dtype: torch.dtype) -> Tensor:
    """Return a table [256, 8] of the inverted bits of each byte, lowest first."""
    # A tensor that is created in inference mode could not be used outside of it.
    with torch.inference_mode(False):
        bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
        return (1 - bits).to(dtype)
