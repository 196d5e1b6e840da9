"""Weights that no file should have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError

__all__ = ["refuse_nan"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 24  # elements that are looked at at once


def refuse_nan(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that are not numbers: every output would be equal to them.

    Infinite values pass: masks are filled with them.

    Raises:
        ExportError: With the names of those that hold NaN.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, value in named if _has_nan(value)]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ExportError(
            f"{', '.join(broken[:5])}{more} of {type(model).__name__} hold NaN: the training diverged, or "
            "the weights were not loaded"
        )


@torch.no_grad()
def _has_nan(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or value.is_meta or value.dtype not in _DTYPES:
        return False
    return any(bool(part.isnan().any()) for part in _parts(value))


def _parts(value: Tensor) -> Iterator[Tensor]:
    """Views of a tensor, none of them large where it has rows."""
    if value.dim() == 0 or value.numel() <= _CHUNK:
        yield value
        return
    rows = max(1, _CHUNK * value.shape[0] // value.numel())
    yield from torch.split(value, rows)
