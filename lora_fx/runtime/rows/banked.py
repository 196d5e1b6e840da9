"""Branches in which each row of a batch has its own factors, taken from stacked factors of many adapters.

A *bank* stacks the factors A (or B, or a vector) of all adapters, [slots, in, out]. Slot 0 changes nothing.
``slots``, [rows], has the slot of each row of the batch. An activation may have t adjacent rows for each of
these, [rows * t, in].

While a call is followed (:mod:`lora_fx.runtime.rows.row_tracking`), each of these functions checks that the
rows of its input are the samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.runtime.rows.samples import check_rows_followed

__all__ = [
    "banked_conv",
    "banked_embedding",
    "banked_linear",
    "banked_pointwise",
    "banked_vector",
    "slots_of_each",
    "spread_channels",
]


def banked_linear(
    x: Tensor,
    bank: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
    weight: str = "",
    turned: bool = False,
) -> Tensor:
    """Return ``x @ bank[slots]``, row by row of the batch.

    Args:
        x: [rows, ..., in], or [rows * t, ..., in].
        bank: [slots, in, out].
        slots: [rows].
        bias: A tensor to add, in a shape that broadcasts to the result, or None.
        weight: Name of the adapted weight in its module.
        turned: True for a bank of weights as a linear layer has them, [slots, out, in].
    """
    check_rows_followed(x, weight)
    factor = bank.index_select(0, slots)
    factor = factor.mT if turned else factor
    if x.dim() == 3 and _is_equal(x.shape[0], slots.shape[0]):
        result = torch.bmm(x, factor)
    elif x.dim() == 2 and _is_equal(x.shape[0], slots.shape[0]):
        result = torch.bmm(x.unsqueeze(1), factor).squeeze(1)
    else:
        rows = x.reshape(slots.shape[0], -1, x.shape[-1])
        result = torch.bmm(rows, factor).reshape(*x.shape[:-1], factor.shape[-1])
    return result if bias is None else result + bias


def banked_embedding(x: Tensor, bank: Tensor, slots: Tensor, weight: str = "") -> Tensor:
    """Return ``bank[slots, x]``: each row looks up the table of its adapter.

    Args:
        x: [rows, ...], or [rows * t, ...].
        bank: [slots, vocabulary, width].
        slots: [rows].
        weight: Name of the adapted weight in its module.

    Returns:
        [rows, ..., width].
    """
    check_rows_followed(x, weight)
    return bank[slots_of_each(slots, x), x]


_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def banked_conv(x: Tensor, bank: Tensor, slots: Tensor, *geometry: Any, weight: str = "") -> Tensor:
    """Compute a convolution of each row with its own kernel.

    No operator takes a kernel for each row. The kernels of all adapters are applied to all rows, and for
    each row the result of its adapter is selected. The kernels have few channels: ``slots * r``.

    Args:
        x: [rows, in, ...], or [rows * t, in, ...].
        bank: [slots, r, in, ...].
        slots: [rows].
        geometry: Stride, padding and dilation.
        weight: Name of the adapted weight in its module.

    Returns:
        [rows, r, ...].
    """
    check_rows_followed(x, weight)
    every: Tensor = _CONVOLUTIONS[x.dim()](x, bank.flatten(0, 1), None, *geometry)
    rows = torch.arange(x.shape[0], device=x.device)
    each = every.reshape(x.shape[0], *bank.shape[:2], *every.shape[2:])
    return each[rows, slots_of_each(slots, rows)]


def banked_pointwise(
    x: Tensor, bank: Tensor, slots: Tensor, bias: Tensor | None = None, weight: str = ""
) -> Tensor:
    """Compute a convolution of size 1 of each row with its own kernel.

    Args:
        x: [rows, r, ...], or [rows * t, r, ...].
        bank: [slots, out, r, 1, ...].
        slots: [rows].
        bias: A vector to add, [out] or [rows, out], or None.
        weight: Name of the adapted weight in its module.
    """
    check_rows_followed(x, weight)
    factor = bank.flatten(2).index_select(0, _repeated(slots, x))
    result = torch.bmm(factor, x.flatten(2)).reshape(x.shape[0], bank.shape[1], *x.shape[2:])
    return result if bias is None else result + spread_channels(bias, result)


def spread_channels(vector: Tensor, like: Tensor) -> Tensor:
    """Reshape a vector of channels, [out] or [rows, out], to broadcast to ``like``, [rows, out, ...]."""
    for _ in range(like.dim() - 2):
        vector = vector.unsqueeze(-1)
    return vector


def banked_vector(bank: Tensor, slots: Tensor, like: Tensor, channels: bool = False) -> Tensor:
    """Return the vector of each row, in a shape that broadcasts to an output.

    Args:
        bank: [slots, out].
        slots: [rows].
        like: The output, [rows, ..., out], or [rows * t, ..., out].
        channels: True if the output is [rows, out, ...], so that :func:`spread_channels` follows.

    Returns:
        [rows, 1, ..., out], or [rows * t, 1, ..., out]; [rows, out] for channels.
    """
    own = bank.index_select(0, _repeated(slots, like))
    for _ in range(0 if channels else like.dim() - 2):
        own = own.unsqueeze(1)
    return own


def slots_of_each(slots: Tensor, x: Tensor) -> Tensor:
    """Return the slots in a shape that broadcasts to other indices of a bank, [rows, ...].

    For indices with one axis, an addition expands the slots to that axis. ONNX needs equal shapes there. A
    trace leaves out an expansion between equal sizes, but the exported file may get one slot for all rows.
    """
    own = _repeated(slots, x)
    if x.dim() == 1:
        return own + torch.arange(x.shape[0], device=x.device) * 0
    for _ in range(x.dim() - 1):
        own = own.unsqueeze(-1)
    return own


def _repeated(slots: Tensor, x: Tensor) -> Tensor:
    """Return the slot of each row of an activation, from the slot of each sample.

    The rows of a sample follow each other along the first axis of the activation.
    """
    if _is_equal(x.shape[0], slots.shape[0]):
        return slots
    times = x.shape[0] // slots.shape[0]
    return slots.unsqueeze(1).expand(slots.shape[0], times).flatten()


def _is_equal(left: int, right: int) -> bool:
    """Return True if two sizes are equal. In a trace, they must be equal for all inputs."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))
