"""Functions that fit a branch to the output of its operation: dtype, sharding, features and axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lora_fx.runtime.modules import factor_beside, is_in_parts

__all__ = ["cast_like", "pad_features", "spread"]


def cast_like(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cast a factor to the dtype of an output, and shard it like the output.

    ``type_as`` would also require the layout of a nested tensor, which a factor cannot have.

    Raises:
        ConfigError: If the layer was parallelized after the rewrite.
    """
    if is_in_parts(factor) or is_in_parts(like):
        factor = factor_beside(factor, like)
    return factor.to(like.dtype)


def pad_features(part: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Pad a slice of the output features with zeros for the other features.

    Args:
        part: [..., n].
        before: Number of features before the slice.
        after: Number of features after the slice.
    """
    if not part.is_nested:
        return F.pad(part, (before, after))
    # Nested tensors support products, but no padding.
    own = torch.eye(part.size(-1), dtype=part.dtype, device=part.device)
    return F.linear(part, F.pad(own, (0, 0, before, after)))


def spread(
    vector: torch.Tensor, like: torch.Tensor, axes: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """Reshape a vector of the output features for broadcasting with an output.

    Args:
        vector: [out].
        like: The output. If it has too few dimensions for the axes, as a matrix times a vector does, the
            vector is returned as it is.
        axes: Axes of the features in an output, counted from its end.
        sizes: Sizes of these axes, if there are several.

    Returns:
        A view with size 1 for every other dimension after the first of the axes.
    """
    if like.dim() < -min(axes):
        return vector
    if len(axes) > 1:
        order = sorted(range(len(axes)), key=lambda index: axes[index])
        vector = vector.view(tuple(sizes)).permute(order)
    kept = iter(vector.shape)
    first = min(axes)
    return vector.reshape([next(kept) if axis in axes else 1 for axis in range(first, 0)])
