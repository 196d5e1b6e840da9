"""Puts a merged weight back into the format that it had, and says what that loses."""

from __future__ import annotations

import math

import torch
from torch import nn

from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import dense, format_of, requantized
from lora_fx.passes.merge.fold import Fold
from lora_fx.passes.merge.report import MergedSite

__all__ = ["renew_layer", "requantized_site"]


def requantized_site(
    change: Fold, old: torch.Tensor, weight: nn.Parameter
) -> tuple[nn.Parameter, MergedSite]:
    """The merged weight in the old one's format; one matrix in fp64 is made for it.

    Args:
        change: What is folded in.
        old: The values of the weight, in the layout of its site.
        weight: The quantized weight.

    Returns:
        The new parameter, and its row in the report.

    Raises:
        MergeError: If the format cannot hold the merged weight.
    """
    exact = change.exact(old)
    before = old.double()
    moved = _relative(exact - before, before)
    del before
    values = exact if change.rows[0][0].site.layout == "out_in" else exact.T
    try:
        made = requantized(values, weight)
    except QuantizationError as error:
        raise MergeError(
            f"{change.name}: the merged weight cannot be quantized as it was: {error}. "
            "Merge without requantize=True: the result is dense then"
        ) from error
    lost = _relative(dense(made, torch.float64) - values, values)
    return made, MergedSite(change.name, change.adapters, math.nan, moved, lost)


def renew_layer(layer: nn.Module) -> None:
    """Has a library's layer use the scales of the weight that was put into it."""
    known = format_of(layer._parameters.get("weight"))
    if known is not None:
        known.layers.renew(layer)


def _relative(difference: torch.Tensor, to: torch.Tensor) -> float:
    """The Frobenius norm of a difference, relative to another's."""
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / to.norm().clamp_min(tiny))
