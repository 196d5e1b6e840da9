"""Folds every weight of a merge: beside the old one, or over it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from lora_fx.passes.merge.fold import Fold
from lora_fx.passes.merge.report import MergedSite, compared
from lora_fx.passes.merge.requantize import requantized_site
from lora_fx.passes.merge.tokens import TokenFold

__all__ = ["fold_all"]

_NOWHERE: Mapping[str, torch.dtype] = {}
_NOTHING: Mapping[str, nn.Parameter] = {}


def fold_all(
    changes: Mapping[str, Fold | TokenFold],
    old_of: Callable[[str], torch.Tensor],
    *,
    over: Collection[str],
    dtypes: Mapping[str, torch.dtype] = _NOWHERE,
    formats: Mapping[str, nn.Parameter] = _NOTHING,
    measure: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
) -> tuple[dict[str, torch.Tensor], tuple[MergedSite, ...]]:
    """Folds weights. Everything that can fail is done before one of them is written over.

    Args:
        changes: What is folded into each weight, by FQN.
        old_of: Gives a weight as it is.
        over: Those that are written over.
        dtypes: Of the merged weights; where there is none, the old weight's.
        formats: The quantised weights in whose formats merged ones are stored again.
        measure: Whether to compare every merged element with fp64.
        progress: Called with (done, total, site name) before each weight.
        keep: Given each new tensor, returns the one to use in its place.

    Returns:
        The merged weights that are new tensors, by FQN, and the row of each weight in the report.

    Raises:
        MergeError: If a merged weight overflows; nothing has been written then.
    """
    for weight in over:
        if weight in changes:
            changes[weight].check(old_of(weight))
    merged: dict[str, torch.Tensor] = {}
    sites: dict[str, MergedSite] = {}
    # A stable sort: those that may fail yet come first.
    for done, weight in enumerate(sorted(changes, key=lambda name: name in over)):
        change, old = changes[weight], old_of(weight)
        if progress is not None:
            progress(done, len(changes), change.name)
        if weight in formats and isinstance(change, Fold):
            merged[weight], sites[weight] = requantized_site(change, old, formats[weight])
            continue
        exact = change.exact(old, dtypes.get(weight)) if measure else None
        if weight in over:
            before, new = old.clone() if measure else old, old
            change.fold_into(new)
        else:
            before, new = old, keep(change.folded(old, dtypes.get(weight)))
            merged[weight] = new
        sites[weight] = compared(change.name, change.adapters, before, new, exact)
    return merged, tuple(sites[weight] for weight in changes)
