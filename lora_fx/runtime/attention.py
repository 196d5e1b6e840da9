"""Operations of attention layers around and between their projections.

Some layers apply several weights in a single call, which no adapter can reach. lora_fx replaces such a call
with separate projections and the functions of this module. These functions decide everything that depends on
sizes, so that one graph holds for every call.

- ``nn.MultiheadAttention``: three input projections, :func:`attend`, the output projection. Masks,
  ``need_weights`` and unbatched inputs are handled here. Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.
- The shifted windows of Swin: :func:`partition`, the projection to q, k and v, :func:`attend_in_windows`, the
  output projection, :func:`reverse`. Padding, shift and mask are computed here. Liu et al. 2021
  (arXiv:2103.14030), section 3.2; 2022 for v2 (arXiv:2111.09883); 2022 for video (arXiv:2106.13230). The
  operations and their order are torchvision's, so that results match it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx import torch_private

__all__ = [
    "attend",
    "attend_in_windows",
    "canonical_mask",
    "causal_hint",
    "fitted_window",
    "partition",
    "reverse",
    "sequence_first_in_memory",
    "without_key_bias",
    "zero_padding",
]


def canonical_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Convert an attention mask to numbers that are added to the scores.

    True in a boolean mask becomes -inf, and False becomes 0, in the dtype of ``like``. A mask of numbers, or
    None, is returned as it is.
    """
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
    """Compute scaled dot-product attention over projected queries, keys and values.

    Args:
        q: Queries, [L, N, E], [N, L, E] with ``batch_first``, or [L, E].
        k: Keys, with S instead of L.
        v: Values, in the shape of the keys.
        key_padding_mask: [N, S] or [S]. This and the next arguments are those of ``nn.MultiheadAttention``.
        need_weights: True to return the attention weights.
        attn_mask: [L, S] or [N * heads, L, S].
        average_attn_weights: True to average the returned weights over the heads.
        is_causal: A hint that ``attn_mask`` is the causal mask.
        heads: Number of heads, which divides E.
        batch_first: True if the batch is the first axis.
        dropout: Dropout probability of the weights in training.
        training: The layer's mode.
        bias_k: An additional key for every sequence, [1, 1, E].
        bias_v: The value of that key, [1, 1, E].
        add_zero_attn: True to add a key and a value of zeros.

    Returns:
        The concatenated outputs of the heads, in the layout of ``q``, and the attention weights if they are
        needed: [N, L, S], or [N, heads, L, S] if they are not averaged.
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


def sequence_first_in_memory(out: Tensor, training: bool) -> Tensor:
    """Lay an output out in memory with its sequence first, as PyTorch's layer does with ``batch_first``.

    A dropout after the layer draws its mask in memory order, so that the same seed gives the same mask.

    Args:
        out: [N, L, E], or [L, E].
        training: The layer's mode. In evaluation the output is returned as it is.
    """
    if not training or out.dim() != 3:
        return out
    return out.transpose(0, 1).contiguous().transpose(0, 1)


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """Add the padding mask to the attention mask, in a shape that broadcasts to [N, heads, L, S].

    Return None if both are None.
    """
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
    """Return ``is_causal``, or if it is None, True for a mask that is causal.

    PyTorch's encoder and decoder check their masks in the same way.

    Args:
        x: [L, N, E], [N, L, E] with ``batch_first``, or [L, E].
        mask: The attention mask, [L, L].
        is_causal: The caller's hint. It is returned without a check unless it is None.
        batch_first: True if the batch is the first axis.
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
    """Set padded positions to zero in the calls in which ``nn.TransformerEncoder`` does so.

    The encoder computes these calls with nested tensors: in evaluation, without gradients, with padding on
    the right and no other mask. The difference shows in an average over all positions.

    Args:
        out: The output of the layers, [N, S, E].
        src: The input of the layers, [N, S, E].
        padding: The padding mask, [N, S].
        mask: The attention mask.
        nested: True if the encoder may use nested tensors at all.
        mask_check: True if the encoder checks first that the padding is on the right.
        training: The mode of the encoder's first layer.
    """
    if padding is None or mask is not None or not nested or training or src.dim() != 3:
        return out
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled():
        return out
    if not torch.backends.mha.get_fastpath_enabled():
        return out
    keep = padding.logical_not()
    if mask_check and not torch_private.is_left_aligned(src, keep):
        return out
    return out.masked_fill(keep.logical_not().unsqueeze(-1), 0.0)


def fitted_window(x: Tensor, window: Sequence[int]) -> list[int]:
    """Return the window, limited to the size of the input along each axis.

    Args:
        x: [N, *sizes, C].
        window: The size of the window along each axis.
    """
    return [min(size, wanted) for size, wanted in zip(x.shape[1:-1], window, strict=True)]


def without_key_bias(bias: Tensor | None) -> Tensor | None:
    """Return the bias of a fused q, k, v projection, [3 E], with zeros for k. Swin v2 has no bias on keys."""
    if bias is None:
        return None
    third = bias.shape[0] // 3
    keep = bias.clone()
    keep[third : 2 * third] = 0.0
    return keep


def partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Split an input into windows.

    Args:
        x: [N, *sizes, C]. It is padded to whole windows.
        window: The size of a window along each axis.
        shift: The cyclic shift of the windows along each axis. An axis with a single window is not shifted.

    Returns:
        [N * windows, volume of a window, C].
    """
    padded, shifts = _geometry(x, window, shift)
    pads = [0, 0]
    for size, whole in zip(reversed(x.shape[1:-1]), reversed(padded), strict=True):
        pads += [0, whole - size]
    return _cut(_rolled(F.pad(x, pads), [-s for s in shifts]), window)


def reverse(windows: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Undo :func:`partition`: join the windows, and remove the shift and the padding.

    Args:
        windows: [N * windows, volume of a window, C].
        like: The input of :func:`partition`, [N, *sizes, C].
        window: The window of :func:`partition`.
        shift: The shift of :func:`partition`.

    Returns:
        [N, *sizes, C].
    """
    padded, shifts = _geometry(like, window, shift)
    counts = [size // wanted for size, wanted in zip(padded, window, strict=True)]
    axes = len(counts)
    x = windows.view(like.shape[0], *counts, *window, windows.shape[-1])
    pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    x = x.permute(0, *pairs, 2 * axes + 1).reshape(like.shape[0], *padded, windows.shape[-1])
    x = _rolled(x, shifts)
    for axis, size in enumerate(like.shape[1:-1], start=1):
        x = x.narrow(axis, 0, size)
    return x.contiguous()


def attend_in_windows(
    qkv: Tensor,
    position_bias: Tensor,
    logit_scale: Tensor | None,
    like: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    dropout: float,
    training: bool,
) -> Tensor:
    """Compute attention within each window.

    Args:
        qkv: Concatenated projected queries, keys and values, [N * windows, volume, 3 E].
        position_bias: A bias to add to the scores, [1, heads, volume, volume].
        logit_scale: For cosine attention (v2), the logarithm of its scale, [heads, 1, 1]. Otherwise None.
        like: The input of :func:`partition`.
        window: The window of :func:`partition`.
        shift: The shift of :func:`partition`. Parts of a window that are not adjacent in the input are masked
            from each other.
        heads: Number of heads, which divides E.
        dropout: Dropout probability of the weights in training.
        training: The layer's mode.

    Returns:
        [N * windows, volume, E].
    """
    count, volume = qkv.shape[:2]
    width = qkv.shape[2] // 3
    parts = qkv.reshape(count, volume, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    q, k, v = parts[0], parts[1], parts[2]
    if logit_scale is None:
        scores = (q * (width // heads) ** -0.5).matmul(k.transpose(-2, -1))
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    scores = scores + position_bias
    padded, shifts = _geometry(like, window, shift)
    if any(shifts):
        mask = _shift_mask(padded, window, shifts, like)
        scores = scores.view(count // mask.shape[0], mask.shape[0], heads, volume, volume)
        scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, heads, volume, volume)
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=training)
    return weights.matmul(v).transpose(1, 2).reshape(count, volume, width)


def _geometry(
    x: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the sizes of an input that is padded to whole windows, and the shift along each axis.

    The shift is 0 along an axis with a single window.
    """
    sizes = x.shape[1:-1]
    padded = [size + (-size) % wanted for size, wanted in zip(sizes, window, strict=True)]
    shifts = [
        0 if wanted >= size else by for size, wanted, by in zip(padded, window, shift, strict=True)
    ]
    return padded, shifts


def _rolled(x: Tensor, shifts: Sequence[int]) -> Tensor:
    if not any(shifts):
        return x
    return torch.roll(x, shifts=tuple(shifts), dims=tuple(range(1, len(shifts) + 1)))


def _cut(x: Tensor, window: Sequence[int]) -> Tensor:
    """Split [N, *sizes, C] into [N * windows, volume, C]. All sizes must be multiples of the window's."""
    axes = len(window)
    counts = [size // wanted for size, wanted in zip(x.shape[1:-1], window, strict=True)]
    pairs = [size for pair in zip(counts, window, strict=True) for size in pair]
    x = x.view(x.shape[0], *pairs, x.shape[-1])
    order = (*range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2))
    total = x.shape[0] * math.prod(counts)
    return x.permute(0, *order, 2 * axes + 1).reshape(total, math.prod(window), x.shape[-1])


def _shift_mask(
    padded: Sequence[int], window: Sequence[int], shifts: Sequence[int], like: Tensor
) -> Tensor:
    """Return -100 for pairs of positions that are in a window only because of the cyclic shift, else 0.

    Returns:
        [windows, volume, volume], in the dtype of ``like``.
    """
    zones = torch.zeros(*padded, dtype=torch.int64, device=like.device)
    for axis, (size, wanted, by) in enumerate(zip(padded, window, shifts, strict=True)):
        if not by:
            continue
        at = torch.arange(size, device=like.device)
        zone = (at >= size - wanted).long() + (at >= size - by).long()
        zones = zones * 3 + zone.view(*(-1 if i == axis else 1 for i in range(len(padded))))
    zones = _cut(zones.unsqueeze(0).unsqueeze(-1), window).squeeze(-1)
    apart = zones.unsqueeze(1) != zones.unsqueeze(2)
    mask = like.new_zeros(apart.shape)
    return mask.masked_fill(apart, -100.0)
