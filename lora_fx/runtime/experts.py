"""What a mixture of experts does around and between the matrices of its experts.

A layer of experts applies, to each token, the matrices of the few experts that a router chose for it (Shazeer
et al. 2017, arXiv:1701.06538). Everything that depends on how many tokens go where is in here, so that one
graph holds for every call; the products themselves stay outside, where adapters are put.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.runtime.samples import like_rows, unseen

__all__ = [
    "as_before",
    "as_matrix",
    "grouped_linear",
    "grouped_mm",
    "repeated",
    "sorted_by_expert",
    "summed",
    "tokens_of",
    "tokens_repeated",
    "tokens_sorted",
    "unsorted",
]

_ALIGNMENT = 16  # bytes: what the grouped kernels of PyTorch want strides to be multiples of


def as_matrix(x: Tensor, column: bool) -> Tensor:
    """A vector as a matrix of one row, or one column; anything else as it is.

    Args:
        x: What is multiplied with several matrices.
        column: Whether it is the right operand.
    """
    return x if x.dim() > 1 else x.unsqueeze(-1 if column else 0)


def as_before(out: Tensor, x: Tensor, column: bool) -> Tensor:
    """A product without the dimension that :func:`as_matrix` has given to its operand.

    Args:
        out: The product.
        x: The operand as it was before.
        column: Whether it was the right one.
    """
    return out if x.dim() > 1 else out.squeeze(-1 if column else -2)


def sorted_by_expert(
    hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Repeats tokens for each of their experts and sorts them, so that an expert's tokens lie together.

    Args:
        hidden: [T, d].
        chosen: The experts of each token, [T, k].
        weights: Their weights, [T, k].
        experts: Number of experts E.

    Returns:
        The tokens [T k, d], their weights [T k], their experts [T k], where each expert's tokens end [E]
        (int32), and the permutation that sorts [T k].
    """
    return unseen(_sorted, hidden, chosen, weights, experts)


def _sorted(
    hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, order = torch.sort(chosen.reshape(-1))
    # As transformers counts, for the same bits and without a synchronization: histc takes no integers on
    # a CPU.
    counted = ids.float() if ids.device.type in ("cpu", "mps") else ids.int()
    counts = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    return hidden[order // chosen.shape[-1]], weights.reshape(-1)[order], ids, ends, order


def unsorted(out: Tensor, order: Tensor) -> Tensor:
    """Puts rows back where :func:`sorted_by_expert` took them from."""
    return unseen(_unsorted, out, order)


def _unsorted(out: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return out[inverse]


def repeated(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Each token once for each of its experts: [T, d] and [T, k] give [T k, d]."""
    return unseen(_repeated, hidden, chosen.shape[-1])


def _repeated(hidden: Tensor, count: int) -> Tensor:
    return hidden.repeat_interleave(count, dim=0)


def summed(out: Tensor, hidden: Tensor) -> Tensor:
    """Sums what a token's experts say, weighted already.

    Args:
        out: [T k, d], a token's experts together.
        hidden: The layer's input, [T, d]: for its size and dtype.
    """
    return like_rows(unseen(_summed, out, hidden), hidden)


def _summed(out: Tensor, hidden: Tensor) -> Tensor:
    tokens = hidden.shape[0]
    choices = out.shape[0] // max(tokens, 1)
    return out.view(tokens, choices, out.shape[-1]).sum(dim=1).to(hidden.dtype)


def tokens_of(expert: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens [T, k] chose an expert, and as which of their choices: (choice, token), both [n]."""
    return unseen(_tokens_of, expert, chosen)


def _tokens_of(expert: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    choice, token = torch.where((chosen == expert).t())
    return choice, token


def tokens_sorted(order: Tensor, chosen: Tensor) -> Tensor:
    """The token of each row that :func:`sorted_by_expert` gives, [T k]."""
    return unseen(torch.floor_divide, order, chosen.shape[-1])


def tokens_repeated(chosen: Tensor) -> Tensor:
    """The token of each row that :func:`repeated` gives, [T k]."""
    rows = torch.arange(chosen.numel(), device=chosen.device)
    return rows // chosen.shape[-1]


_MOE = "transformers.integrations.moe"


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The grouped product of transformers, which chooses a kernel for the device and the dtype.

    Args:
        x: [n, in], sorted by expert.
        weight: [E, in, out].
        ends: Where each expert's rows end, [E].
    """
    # Only a model of transformers calls it, which has loaded the module. Dynamo of PyTorch 2.11 cannot trace
    # the import of a part of a package that loads lazily.
    product: Tensor = sys.modules[_MOE]._grouped_mm(x, weight, ends)
    return product


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows times the matrix of their expert: ``y[i] = weight[e(i)] x[i]``; no tensor of E matrices is made.

    Args:
        x: [n, in], sorted by expert; cast to the dtype of ``weight``.
        weight: [E, out, in].
        ends: Where each expert's rows end, [E]; rows after the last end give zeros.

    Returns:
        [n, out].
    """
    out: Tensor = _grouped(x.to(weight.dtype), weight, ends)
    return out


# PyTorch's own grouped product wants sizes that are multiples of 16 bytes: most ranks are not. As operators
# they are opaque to torch.compile, which knows no loop over the values of a tensor.


@torch.library.custom_op("lora_fx::grouped_linear", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(x):
        padded = _aligned(_aligned(weight, 1), 2)
        out = F.grouped_mm(_aligned(x, 1), padded.mT, offs=ends)[:, : weight.shape[1]]
        rows = torch.arange(x.shape[0], device=x.device)
        # What the kernel leaves untouched is not zero.
        return torch.where((rows < ends[-1])[:, None], out, 0).contiguous()
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix.T, out=out[start:end])
        start = end
    return out


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("lora_fx::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``Σ left[i]ᵀ right[i]`` over the rows of each expert: [n, p] and [n, q] give [E, p, q]."""
    if _has_kernel(left):
        out = F.grouped_mm(_aligned(left, 1).T, _aligned(right, 1), offs=ends)
        return out[:, : left.shape[1], : right.shape[1]].contiguous()
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    start = 0
    for place, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=place)
        start = end
    return out


@_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _grouped(grad, weight.mT, ends) if wanted[0] else None,
        _outer(grad, x, ends) if wanted[1] else None,
        None,
    )


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, ends = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _grouped(right, grad, ends) if wanted[0] else None,
        _grouped(left, grad.mT, ends) if wanted[1] else None,
        None,
    )


_grouped.register_autograd(_grouped_backward, setup_context=_remember)
_outer.register_autograd(_outer_backward, setup_context=_remember)


def _has_kernel(x: Tensor) -> bool:
    """Whether PyTorch has a grouped kernel that is no loop: half precision, on a card that has it."""
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _aligned(tensor: Tensor, axis: int) -> Tensor:
    """Zeros after the last along an axis, up to a multiple of 16 bytes."""
    rest = -tensor.shape[axis] % (_ALIGNMENT // tensor.element_size())
    if not rest:
        return tensor.contiguous()
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1 - axis), 0, rest))
