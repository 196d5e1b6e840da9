"""What the shifted-window attention of Swin does around its two projections.

torchvision applies both weights inside one function, where no adapter can reach them. lora_fx writes it
out: :func:`partition`, the projection to q, k and v, :func:`attend_in_windows`, the projection out,
:func:`reverse`. What depends on the size of the input (padding, shift, mask) is decided in here, so that one
graph holds for every size. Liu et al. 2021 (arXiv:2103.14030), section 3.2; 2022 for v2 (arXiv:2111.09883);
2022 for video (arXiv:2106.13230). The operations and their order are torchvision's, and so are the bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_in_windows", "fitted_window", "partition", "reverse", "without_key_bias"]


def fitted_window(x: Tensor, window: Sequence[int]) -> list[int]:
    """The window, no larger than the input along any axis.

    Args:
        x: [N, *sizes, C].
        window: Its size along every axis.
    """
    return [min(size, wanted) for size, wanted in zip(x.shape[1:-1], window, strict=True)]


def without_key_bias(bias: Tensor | None) -> Tensor | None:
    """The bias of a fused q, k, v projection, [3 E], with that of k at zero."""
    if bias is None:
        return None
    third = bias.shape[0] // 3
    keep = bias.clone()
    keep[third : 2 * third] = 0.0
    return keep


def partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Cuts an input into windows.

    Args:
        x: [N, *sizes, C], padded here to whole windows.
        window: The size of a window along every axis.
        shift: By how much the windows are shifted, cyclically; not along an axis of one window.

    Returns:
        [N * windows, volume of one, C].
    """
    padded, shifts = _geometry(x, window, shift)
    pads = [0, 0]
    for size, whole in zip(reversed(x.shape[1:-1]), reversed(padded), strict=True):
        pads += [0, whole - size]
    return _cut(_rolled(F.pad(x, pads), [-s for s in shifts]), window)


def reverse(windows: Tensor, like: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Puts windows together again.

    Args:
        windows: [N * windows, volume of one, C].
        like: What :func:`partition` was given, [N, *sizes, C].
        window: As it was given.
        shift: As it was given.

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
    """Attention within each window.

    Args:
        qkv: Projected queries, keys and values side by side, [N * windows, volume, 3 E].
        position_bias: Added to the scores, [1, heads, volume, volume].
        logit_scale: For cosine attention (v2): the logarithm of its scale, [heads, 1, 1].
        like: What :func:`partition` was given.
        window: As it was given.
        shift: As it was given. Parts of a window that are no neighbors in the input do not see each
            other.
        heads: Number of heads, which divides E.
        dropout: Probability, on the weights, in training.
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
        mask = _strangers(padded, window, shifts, like)
        scores = scores.view(count // mask.shape[0], mask.shape[0], heads, volume, volume)
        scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, heads, volume, volume)
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=training)
    return weights.matmul(v).transpose(1, 2).reshape(count, volume, width)


def _geometry(
    x: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Sizes after padding, and the shift along each axis."""
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
    """[N, *sizes, C], all of them multiples of the window's, to [N * windows, volume, C]."""
    axes = len(window)
    counts = [size // wanted for size, wanted in zip(x.shape[1:-1], window, strict=True)]
    pairs = [size for pair in zip(counts, window, strict=True) for size in pair]
    x = x.view(x.shape[0], *pairs, x.shape[-1])
    order = (*range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2))
    total = x.shape[0] * math.prod(counts)
    return x.permute(0, *order, 2 * axes + 1).reshape(total, math.prod(window), x.shape[-1])


def _strangers(
    padded: Sequence[int], window: Sequence[int], shifts: Sequence[int], like: Tensor
) -> Tensor:
    """-100 for each pair of a window that only the cyclic shift brought together, else 0.

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
