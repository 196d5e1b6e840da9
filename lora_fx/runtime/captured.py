"""Functions that captured graphs call for code that PyTorch has no function for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lora_fx import torch_private

__all__ = ["in_place", "output_padding"]


def in_place(operation: str, left: Any, right: Any) -> Any:
    """Run an augmented assignment such as ``left += right``. Tensors change in place, numbers do not.

    Args:
        operation: A name in :mod:`operator`, such as ``iadd``.
        left: The left operand.
        right: The right operand.
    """
    return getattr(operator, operation)(left, right)


def output_padding(
    x: torch.Tensor,
    output_size: Sequence[int] | None,
    default: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
) -> Sequence[int]:
    """Return the output padding with which a transposed convolution gets a requested output size.

    Args:
        x: The input.
        output_size: The size, with or without the dimensions before the spatial ones; or None.
        default: The layer's own output padding, which is returned if ``output_size`` is None.
        stride: The layer's stride.
        padding: The layer's padding.
        kernel_size: The layer's kernel size.
        dilation: The layer's dilation.

    Raises:
        ValueError: From PyTorch, for a size that the layer cannot produce.
    """
    if output_size is None:
        return default
    layer: Any = SimpleNamespace(output_padding=default)
    geometry: tuple[Any, ...] = (stride, padding, kernel_size, len(kernel_size), dilation)
    size: Any = output_size
    extra: Sequence[int] = torch_private.OUTPUT_PADDING(layer, x, size, *geometry)
    return extra
