"""What ``nn.MultiheadAttention`` does between its projections.

The layer applies four weights inside one call, where no adapter can reach them. lora_fx writes it out:
three projections in, :func:`attend`, one projection out. Everything that depends on how the layer is
called (masks, ``need_weights``, unbatched inputs) is decided in here, so that one graph holds for every
call. Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "canonical_mask", "causal_hint", "zero_padding"]


def canonical_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to add to the scores: a boolean one becomes 0 and -inf, in the dtype of ``like``."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype is not torch.bool:
        raise AssertionError(
            f"only boolean and floating-point masks are supported, found {mask.dtype}"
        )
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    *,
    heads: int,
    batch_first: bool,
    dropout: float,
    training: bool,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over projected queries, keys and values.

    Args:
        q: Queries, [L, N, E], [N, L, E] with ``batch_first``, or [L, E].
        k: Keys, S in place of L.
        v: Values.
        key_padding_mask: [N, S] or [S]; like what follows, as ``nn.MultiheadAttention`` takes it.
        need_weights: Whether the weights are returned.
        attn_mask: [L, S] or [N * heads, L, S].
        average_attn_weights: Whether over the heads.
        is_causal: A hint that ``attn_mask`` is the causal mask.
        heads: Number of heads, which divides E.
        batch_first: Whether the batch comes first.
        dropout: Probability, on the weights, in training.
        training: The layer's mode.
        bias_k: One more key for every sequence, [1, 1, E].
        bias_v: Its value.
        add_zero_attn: Whether to add a key and a value of zeros.

    Returns:
        The heads' outputs side by side, in the layout of ``q``, and the attention weights if they
        are needed: [N, L, S], or [N, heads, L, S] when they are not averaged.
    """
    batched = q.dim() == 3
    if not batched:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = None if hinted else canonical_mask(attn_mask, q)
    padding = canonical_mask(key_padding_mask, q)
    width = k.shape[1]
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(k.shape[0], 1, -1)], 1)
        v = torch.cat([v, bias_v.expand(v.shape[0], 1, -1)], 1)
    if add_zero_attn:
        k = torch.cat([k, k.new_zeros(k.shape[0], 1, k.shape[2])], 1)
        v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
    extra = k.shape[1] - width
    mask = None if mask is None else F.pad(mask, (0, extra))
    padding = None if padding is None else F.pad(padding, (0, extra))
    q, k, v = (torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = _merged(mask, padding, q.shape[0], heads)
    probability = dropout if training else 0.0
    weights: Tensor | None = None
    if need_weights:
        out, weights = _explicit(q, k, v, mask, probability)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, probability, hinted)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return out if batch_first else out.transpose(0, 1), weights


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """Both masks as one that broadcasts to [N, heads, L, S]."""
    if mask is not None and mask.dim() == 3:
        mask = torch.unflatten(mask, 0, (batch, heads))
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


def causal_hint(x: Tensor, mask: Tensor | None, is_causal: bool | None, batch_first: bool) -> bool:
    """What a stack of layers makes of ``is_causal=None``: whether the mask is the causal one.

    Args:
        x: [L, N, E], [N, L, E] with ``batch_first``, or [L, E].
        mask: The attention mask, [L, L].
        is_causal: The caller's hint; it is believed.
        batch_first: Whether the batch comes first.
    """
    if is_causal is not None or mask is None:
        return bool(is_causal)
    length = x.shape[1] if x.dim() == 3 and batch_first else x.shape[0]
    causal = torch.triu(mask.new_full((length, length), -math.inf, dtype=x.dtype), diagonal=1)
    added = canonical_mask(mask, x)
    return added is not None and mask.shape == causal.shape and torch.equal(added, causal)


def zero_padding(
    out: Tensor,
    src: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    *,
    nested: bool,
    mask_check: bool,
    training: bool,
) -> Tensor:
    """Zeros where padding is, in those calls in which a stack of layers of PyTorch gives zeros there.

    That is where it computes with nested tensors: in evaluation, without gradients, with padding on the
    right and no other mask. Whoever averages over all positions sees the difference.

    Args:
        out: What the layers gave, [N, S, E].
        src: What they were given, [N, S, E].
        padding: The padding mask, [N, S].
        mask: The attention mask.
        nested: Whether the stack may use nested tensors at all.
        mask_check: Whether it looks first where the padding is.
        training: Mode of its first layer.
    """
    if padding is None or mask is not None or not nested or training or src.dim() != 3:
        return out
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled():
        return out
    if not torch.backends.mha.get_fastpath_enabled():
        return out
    keep = padding.logical_not()
    if mask_check and not torch._nested_tensor_from_mask_left_aligned(src, keep):
        return out
    return out.masked_fill(keep.logical_not().unsqueeze(-1), 0.0)
