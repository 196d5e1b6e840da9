"""Branches in which each row of a batch has its own factors, out of a stack of those of many adapters.

A *bank* is the factor A (or B, or a vector) of every adapter, [slots, in, out]; slot 0 changes nothing.
``slots``, [rows], says for each row of the batch which of them it has. A batch whose samples have several
rows each has them one after the other, [rows * t, in].

While a call is followed (:mod:`lora_fx.runtime.row_tracking`), each of these functions has it looked at
whether its input has the samples as its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fx.runtime.samples import check_rows_followed

__all__ = ["banked_embedding", "banked_linear", "banked_vector"]


def banked_linear(
    x: Tensor, bank: Tensor, slots: Tensor, bias: Tensor | None = None, weight: str = ""
) -> Tensor:
    """``x @ bank[slots]``, row by row of the batch.

    Args:
        x: [rows, ..., in], or [rows * t, ..., in].
        bank: [slots, in, out].
        slots: [rows].
        bias: What is added, in a shape that meets the result; None for nothing.
        weight: Name of the adapted weight in its module.
    """
    check_rows_followed(x, weight)
    factor = bank.index_select(0, slots)
    if x.dim() == 3 and _is_equal(x.shape[0], slots.shape[0]):
        result = torch.bmm(x, factor)
    elif x.dim() == 2 and _is_equal(x.shape[0], slots.shape[0]):
        result = torch.bmm(x.unsqueeze(1), factor).squeeze(1)
    else:
        rows = x.reshape(slots.shape[0], -1, x.shape[-1])
        result = torch.bmm(rows, factor).reshape(*x.shape[:-1], bank.shape[-1])
    return result if bias is None else result + bias


def banked_embedding(x: Tensor, bank: Tensor, slots: Tensor, weight: str = "") -> Tensor:
    """``bank[slots, x]``: each row looks up in the table of its own adapter.

    Args:
        x: [rows, ...], or [rows * t, ...].
        bank: [slots, vocabulary, width].
        slots: [rows].
        weight: Name of the adapted weight in its module.

    Returns:
        [rows, ..., width].
    """
    check_rows_followed(x, weight)
    return bank[_beside(slots, x), x]


def banked_vector(bank: Tensor, slots: Tensor, like: Tensor) -> Tensor:
    """The vector of each row, as it meets an output.

    Args:
        bank: [slots, out].
        slots: [rows].
        like: The output, [rows, ..., out], or [rows * t, ..., out].

    Returns:
        [rows, 1, ..., out], or [rows * t, 1, ..., out].
    """
    own = bank.index_select(0, _repeated(slots, like))
    for _ in range(like.dim() - 2):
        own = own.unsqueeze(1)
    return own


def _beside(slots: Tensor, x: Tensor) -> Tensor:
    """The slots in a shape that meets the whole of an activation."""
    own = _repeated(slots, x)
    for _ in range(x.dim() - 1):
        own = own.unsqueeze(-1)
    return own


def _repeated(slots: Tensor, x: Tensor) -> Tensor:
    """The slots once for each row of an activation along its first axis."""
    if _is_equal(x.shape[0], slots.shape[0]):
        return slots
    times = x.shape[0] // slots.shape[0]
    return slots.unsqueeze(1).expand(slots.shape[0], times).flatten()


def _is_equal(one: int, other: int) -> bool:
    """Whether two sizes are the same, in a trace at every size."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))
