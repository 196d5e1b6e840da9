"""Operations of a mixture of experts around and between the matrices of its experts.

A layer of experts applies, to each token, the matrices of the few experts that a router chose for it (Shazeer
et al. 2017, arXiv:1701.06538). All code that depends on the number of tokens of each expert is in this
module, so that one graph holds for every call. The products themselves stay in the graph, and get adapters
there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from lora_fx.formats import StackedTensor, grouped_product
from lora_fx.runtime.rows import like_rows, unseen

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

_ALIGNMENT = 16  # bytes: the grouped kernels of PyTorch need strides that are multiples of it


def as_matrix(x: Tensor, column: bool) -> Tensor:
    """Return a vector as a matrix of one row or one column, and any other tensor as it is.

    Args:
        x: An operand that is multiplied with several matrices.
        column: True if it is the right operand.
    """
    return x if x.dim() > 1 else x.unsqueeze(-1 if column else 0)


def as_before(out: Tensor, x: Tensor, column: bool) -> Tensor:
    """Remove from a product the dimension that :func:`as_matrix` has added to its operand.

    Args:
        out: The product.
        x: The operand before :func:`as_matrix`.
        column: True if it was the right operand.
    """
    return out if x.dim() > 1 else out.squeeze(-1 if column else -2)


def sorted_by_expert(
    hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Repeat tokens for each of their experts and sort them, so that an expert's tokens are contiguous.

    Args:
        hidden: [T, d].
        chosen: The experts of each token, [T, k].
        weights: Their weights, [T, k].
        experts: Number of experts E.

    Returns:
        The tokens [T k, d], their weights [T k], their experts [T k], the end of each expert's tokens [E]
        (int32), and the sorting permutation [T k].
    """
    return unseen(_sorted, hidden, chosen, weights, experts)


def _sorted(
    hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, order = torch.sort(chosen.reshape(-1))
    # Count as transformers does, for the same bits and without a synchronization. histc takes no integers on
    # a CPU.
    counted = ids.float() if ids.device.type in ("cpu", "mps") else ids.int()
    counts = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    return hidden[order // chosen.shape[-1]], weights.reshape(-1)[order], ids, ends, order


def unsorted(out: Tensor, order: Tensor) -> Tensor:
    """Undo the sort of :func:`sorted_by_expert`."""
    return unseen(_unsorted, out, order)


def _unsorted(out: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return out[inverse]


def repeated(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Repeat each token for each of its experts: [T, d] and [T, k] give [T k, d]."""
    return unseen(_repeated, hidden, chosen.shape[-1])


def _repeated(hidden: Tensor, count: int) -> Tensor:
    return hidden.repeat_interleave(count, dim=0)


def summed(out: Tensor, hidden: Tensor) -> Tensor:
    """Sum the weighted outputs of the experts of each token.

    Args:
        out: [T k, d], with the outputs for one token adjacent.
        hidden: The layer's input, [T, d], which gives the size and the dtype of the result.
    """
    return like_rows(unseen(_summed, out, hidden), hidden)


def _summed(out: Tensor, hidden: Tensor) -> Tensor:
    tokens = hidden.shape[0]
    choices = out.shape[0] // max(tokens, 1)
    return out.view(tokens, choices, out.shape[-1]).sum(dim=1).to(hidden.dtype)


def tokens_of(expert: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (choice, token), [n] each, for the entries of ``chosen``, [T, k], that are this expert."""
    return unseen(_tokens_of, expert, chosen)


def _tokens_of(expert: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    choice, token = torch.where((chosen == expert).t())
    return choice, token


def tokens_sorted(order: Tensor, chosen: Tensor) -> Tensor:
    """Return the token of each row of the result of :func:`sorted_by_expert`, [T k]."""
    return unseen(torch.floor_divide, order, chosen.shape[-1])


def tokens_repeated(chosen: Tensor) -> Tensor:
    """Return the token of each row of the result of :func:`repeated`, [T k]."""
    rows = torch.arange(chosen.numel(), device=chosen.device)
    return rows // chosen.shape[-1]


_MOE = "transformers.integrations.moe"


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute the grouped product of transformers, which chooses a kernel for the device and the dtype.

    Args:
        x: [n, in], sorted by expert.
        weight: [E, in, out].
        ends: The end of each expert's rows, [E].
    """
    stood_for: Any = weight
    if not isinstance(stood_for, Tensor):  # a stack of an export, which overrides this function
        replaced: Tensor = handle_torch_function(grouped_mm, (weight,), x, weight, ends)
        return replaced
    if isinstance(weight, StackedTensor):
        return grouped_product(x, weight, ends)
    # Only models of transformers call this, so the module is already imported. Dynamo of PyTorch 2.11 cannot
    # trace an import from a package that loads its modules lazily.
    product: Tensor = sys.modules[_MOE]._grouped_mm(x, weight, ends)
    return product


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows with the matrix of their expert: ``y[i] = weight[e(i)] x[i]``.

    The matrices are not gathered for each row.

    Args:
        x: [n, in], sorted by expert. It is cast to the dtype of ``weight``.
        weight: [E, out, in].
        ends: The end of each expert's rows, [E]. Rows after the last end give zeros.

    Returns:
        [n, out].
    """
    out: Tensor = _grouped(x.to(weight.dtype), weight, ends)
    return out


# PyTorch's own grouped product needs sizes that are multiples of 16 bytes, which most ranks are not.
# These are custom operators, because torch.compile cannot trace a loop over the values of a tensor.


@torch.library.custom_op("lora_fx::grouped_linear", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _has_kernel(x):
        padded = _aligned(_aligned(weight, 1), 2)
        out = F.grouped_mm(_aligned(x, 1), padded.mT, offs=ends)[:, : weight.shape[1]]
        rows = torch.arange(x.shape[0], device=x.device)
        # The kernel leaves rows after the last end uninitialized.
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
    """Return ``Σ left[i]ᵀ right[i]`` over the rows of each expert: [n, p] and [n, q] give [E, p, q]."""
    if _has_kernel(left):
        out = F.grouped_mm(_aligned(left, 1).T, _aligned(right, 1), offs=ends)
        return out[:, : left.shape[1], : right.shape[1]].contiguous()
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    start = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=matrix)
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
    """Return True if PyTorch computes a grouped product in one kernel: in bf16 on GPUs of capability 8.0."""
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _aligned(tensor: Tensor, axis: int) -> Tensor:
    """Pad an axis with zeros at its end, up to a multiple of 16 bytes."""
    padding = -tensor.shape[axis] % (_ALIGNMENT // tensor.element_size())
    if not padding:
        return tensor.contiguous()
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1 - axis), 0, padding))
