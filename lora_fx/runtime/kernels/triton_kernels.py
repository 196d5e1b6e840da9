"""Triton kernels for products with ``drop(x)`` in one pass over x, with masks that are never stored.

PyTorch on a GPU draws a number of four bytes for each element and compares it. It multiplies x with the
result into a new matrix, and saves a byte for each element. Here a mask is a *seed* of eight bytes
(:func:`lora_fx.runtime.kernels.masks.draw`). Each kernel draws the elements of its tile, in registers, from
Philox 4x32-10 (Salmon et al. 2011, SC '11). Its outputs depend only on the seed and the position in the
matrix. So the forward, the backward and a checkpoint's recomputation have the same mask, whatever their tiles
are. One call of Philox gives the bytes of sixteen neighbors in a row. Element (i, j) is kept if byte
``j % 16`` of the call with the counter ``(j // 16, i, 0, 0)`` is at least the threshold.

Sums over tokens or features are split by the shapes alone, and added in a fixed order. No operation is
atomic, and a run repeats bit for bit. The products are operators, ``lora_fx::…``, so that modes of PyTorch
see them. No other module imports Triton. This module is imported when a mask is first drawn on a GPU
(:func:`lora_fx.runtime.kernels.masks.has_kernels`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_dropped_", "check", "dropout_mask", "dropped_outer", "dropped_product"]

# Programs that a grid should have. It is a constant, so that splits depend on shapes and not on the GPU.
_PROGRAMS = 256
# Least number of tiles that a program should add up if a sum is split.
_LEAST_STEPS = 4
# This is Triton's default, but Triton warns unless it is set.
_COMPILED = {"enable_fp_fusion": True}


@triton.jit
def _kept(packed, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the mask of a tile, bool [ROWS, COLUMNS], which starts at a multiple of 16 columns.

    ``packed`` has the threshold in its lowest byte, and the seed of Philox above it.
    """
    groups = first // 16 + tl.arange(0, COLUMNS // 16)
    zero = tl.zeros((ROWS, COLUMNS // 16), tl.int32)
    low, high = groups[None, :] + zero, rows[:, None] + zero
    w0, w1, w2, w3 = tl.philox(packed >> 8, low, high, zero, zero)
    # Order the words, then their bytes, as the columns.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 4, 1))
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)
    numbers = tl.reshape((words >> shifts[None, None, :]) & 255, (ROWS, COLUMNS))
    return numbers >= (packed & 255).to(tl.uint32)


@triton.jit
def _tile(
    x,
    packed,
    rows,
    first,
    row_count,
    column_count,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return ``drop(x)`` of a tile, with zeros outside of the matrix."""
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = (
        rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    )
    values = tl.load(x + offsets, mask=inside, other=0.0)
    return tl.where(_kept(packed, rows, first, ROWS, COLUMNS), values, 0.0)


@triton.jit
def _plus(total, left, right, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """Return ``total + left @ right``, in fp32."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["row_count"])
def _mask_kernel(
    out,
    mask,
    row_count,
    column_count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    packed = tl.load(mask)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    tl.store(out + offsets, _kept(packed, rows, first, ROWS, COLUMNS).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["row_count", "steps"])
def _product_kernel(
    x,
    a,
    out,
    mask,
    row_count,
    column_count,
    rank,
    steps,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute ``out[part] = drop(x) Aᵀ`` over the columns of a part."""
    packed = tl.load(mask)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for step in range(steps):
        first = (part * steps + step) * COLUMNS
        tile = _tile(
            x,
            packed,
            rows,
            first,
            row_count,
            column_count,
            row_stride,
            column_stride,
            ROWS,
            COLUMNS,
        )
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns[:, None] < column_count) & (ranks[None, :] < rank)
        factor = tl.load(
            a + ranks[None, :] * column_count + columns[:, None], mask=inside, other=0.0
        )
        total = _plus(total, tile, factor, PRECISION, WIDE)
    inside = (rows[:, None] < row_count) & (ranks[None, :] < rank)
    offsets = (part.to(tl.int64) * row_count + rows[:, None]) * rank + ranks[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_count", "steps"])
def _outer_kernel(
    grad,
    x,
    out,
    mask,
    row_count,
    column_count,
    rank,
    steps,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute ``out[part] = gradᵀ drop(x)`` over the rows of a part."""
    packed = tl.load(mask)
    first = tl.program_id(0) * COLUMNS
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for step in range(steps):
        rows = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        tile = _tile(
            x,
            packed,
            rows,
            first,
            row_count,
            column_count,
            row_stride,
            column_stride,
            ROWS,
            COLUMNS,
        )
        inside = (ranks[:, None] < rank) & (rows[None, :] < row_count)
        offsets = rows.to(tl.int64)[None, :] * rank + ranks[:, None]
        inner = tl.load(grad + offsets, mask=inside, other=0.0)
        total = _plus(total, inner, tile, PRECISION, WIDE)
    columns = first + tl.arange(0, COLUMNS)
    inside = (ranks[:, None] < rank) & (columns[None, :] < column_count)
    offsets = (part.to(tl.int64) * rank + ranks[:, None]) * column_count + columns[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_count"])
def _add_kernel(
    total,
    grad,
    a,
    mask,
    row_count,
    column_count,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute ``total += mask ∘ (grad A)``, for RANK ranks at a time."""
    packed = tl.load(mask)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = (rows[:, None] < row_count) & (ranks[None, :] < rank)
        offsets = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
        inner = tl.load(grad + offsets, mask=inside, other=0.0)
        inside = (ranks[:, None] < rank) & (columns[None, :] < column_count)
        factor = tl.load(
            a + ranks[:, None] * column_count + columns[None, :], mask=inside, other=0.0
        )
        change = _plus(change, inner, factor, PRECISION, WIDE)
    change = tl.where(_kept(packed, rows, first, ROWS, COLUMNS), change, 0.0)
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    before = tl.load(total + offsets, mask=inside, other=0.0)
    after = (before.to(tl.float32) + change).to(total.dtype.element_ty)
    tl.store(total + offsets, after, mask=inside)


def _power(size: int) -> int:
    """Return the least power of two that is at least a size, and at least 16 for matrix instructions."""
    return max(16, 1 << (size - 1).bit_length())


def _parts(programs: int, steps: int) -> tuple[int, int]:
    """Return the number of parts that a sum of ``steps`` tiles is split into, and the tiles of each."""
    wanted = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(steps, _LEAST_STEPS))
    each = triton.cdiv(steps, max(1, wanted))
    return triton.cdiv(steps, each), each


def _tiles(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return tile sizes and options with which a tile that spans the whole rank fits into registers."""
    wide = dtype == torch.float32
    return {
        **_COMPILED,
        "ROWS": (16 if rank > 128 else 32) if wide else (32 if rank > 64 else 64),
        "COLUMNS": 32 if wide or rank > 128 else 64,
        "RANK": _power(rank),
        "PRECISION": _precision(),
        # Triton's interpreter has no products of bf16; in fp32 they are the same.
        "WIDE": dtype == torch.bfloat16 and not isinstance(_add_kernel, triton.JITFunction),
        "num_warps": 4 if rank <= 64 else 8,
        "num_stages": 2 if wide or rank > 64 else 3,
    }


def _precision() -> str:
    """Return the precision of fp32 products that PyTorch is set to use for its own products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _operator(schema: str) -> Any:
    """Return a decorator that registers an operator, which runs on the device of its first argument."""

    def register(function: Any) -> Any:
        @functools.wraps(function)
        def run(first: Tensor, *args: Any) -> Any:
            # Triton launches on the current device.
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return function(first, *args)

        name, bracket, arguments = schema.partition("(")
        torch.library.define(f"lora_fx::{name}", bracket + arguments)
        torch.library.impl(f"lora_fx::{name}", "default", run)
        return getattr(torch.ops.lora_fx, name)

    return register


@_operator("dropout_mask(Tensor mask, SymInt rows, SymInt columns) -> Tensor")
def dropout_mask(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Return the mask of a seed, bool [rows, columns], which is True for the elements to keep.

    Args:
        mask: A seed of :func:`lora_fx.runtime.kernels.masks.draw`.
        rows: The number of rows of the matrix.
        columns: Its number of columns.
    """
    out = torch.empty(rows, columns, dtype=torch.uint8, device=mask.device)
    sizes = {"ROWS": 32, "COLUMNS": 128}
    grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
    _mask_kernel[grid](out, mask, rows, columns, **sizes, **_COMPILED)
    return out.view(torch.bool)


@_operator("dropped_product(Tensor x, Tensor a, Tensor mask) -> Tensor")
def dropped_product(x: Tensor, a: Tensor, mask: Tensor) -> Tensor:
    """Return ``drop(x) Aᵀ``, [tokens, r], not scaled.

    Args:
        x: [..., in].
        a: A, [r, in], in the dtype of x.
        mask: A seed for the shape of x.
    """
    x, a = _flat(x), a.contiguous()
    (rows, columns), rank = x.shape, a.shape[0]
    tiles = _tiles(rank, x.dtype)
    programs = triton.cdiv(rows, tiles["ROWS"])
    parts, steps = _parts(programs, triton.cdiv(columns, tiles["COLUMNS"]))
    out = x.new_empty(parts, rows, rank, dtype=x.dtype if parts == 1 else torch.float32)
    sizes = (rows, columns, rank, steps, *x.stride())
    _product_kernel[programs, parts](x, a, out, mask, *sizes, **tiles)
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


@_operator("dropped_outer(Tensor grad, Tensor x, Tensor mask) -> Tensor")
def dropped_outer(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of A, ``gradᵀ drop(x)``, [r, in], not scaled.

    Args:
        grad: The gradient of the product with A, [tokens, r].
        x: [..., in], in the same dtype.
        mask: A seed for the shape of x.
    """
    x, grad = _flat(x), grad.contiguous()
    (rows, columns), rank = x.shape, grad.shape[1]
    tiles = _tiles(rank, x.dtype)
    programs = triton.cdiv(columns, tiles["COLUMNS"])
    parts, steps = _parts(programs, triton.cdiv(rows, tiles["ROWS"]))
    out = x.new_empty(parts, rank, columns, dtype=x.dtype if parts == 1 else torch.float32)
    sizes = (rows, columns, rank, steps, *x.stride())
    _outer_kernel[programs, parts](grad, x, out, mask, *sizes, **tiles)
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


@_operator("add_dropped_(Tensor(a!) total, Tensor grad, Tensor a, Tensor mask) -> ()")
def add_dropped_(total: Tensor, grad: Tensor, a: Tensor, mask: Tensor) -> None:
    """Add the gradient of x in place: ``total += mask ∘ (grad A)``.

    Args:
        total: [tokens, in], contiguous.
        grad: The gradient of the product with A, [tokens, r], in the same dtype.
        a: A, [r, in], in the same dtype.
        mask: A seed for the shape of the total.
    """
    grad, a = grad.contiguous(), a.contiguous()
    (rows, columns), rank = total.shape, a.shape[0]
    # The kernel loops over blocks of ranks.
    tiles = {**_tiles(min(rank, 64), total.dtype), "ROWS": 64, "COLUMNS": 64, "num_stages": 2}
    grid = (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(columns, tiles["COLUMNS"]))
    _add_kernel[grid](total, grad, a, mask, rows, columns, rank, **tiles)


@functools.cache
def check(device: torch.device) -> str:
    """Compile the kernels for a device and compare their results with those of PyTorch, once.

    Returns:
        The problem in words, or an empty string.
    """
    values = torch.Generator().manual_seed(0)
    x, grad, a = (
        torch.randn(shape, generator=values).to(device) for shape in ((40, 72), (40, 3), (3, 72))
    )
    mask = torch.tensor(7 * 256 + 128, device=device)
    try:
        dropped = x * dropout_mask(mask, *x.shape)
        total = torch.zeros_like(x)
        add_dropped_(total, grad, a, mask)
        pairs = {
            "drop(x) Aᵀ": (dropped_product(x, a, mask), dropped @ a.T),
            "gradᵀ drop(x)": (dropped_outer(grad, x, mask), grad.T @ dropped),
            "the gradient of x": (total, (grad @ a) * (dropped != 0)),
        }
        for name, (result, expected) in pairs.items():
            if not torch.allclose(result, expected, rtol=0.01, atol=0.05):
                return f"{name} is not what PyTorch computes"
    # No compiler, no Python headers, a GPU that Triton does not know: each error says what is missing.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""
