"""Merged weights in other forms than a rounded sum: quantized again, or as they were trained to be stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import nn

from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import (
    dense,
    deployment_options,
    follow_state,
    format_of,
    held,
    quantization_of,
    requantized,
)
from lora_fx.ir import PlannedSite
from lora_fx.passes.merge.compensated import NEAREST, Rounding
from lora_fx.passes.merge.dense import (
    quantized_weights,
)
from lora_fx.passes.merge.fold import (
    Fold,
    TokenFold,
)
from lora_fx.passes.merge.rounding import MergedSite
from lora_fx.passes.merge.survival import Slice, Survival, measure_survival
from lora_fx.passes.parameters import (
    factors_of,
    gathered,
    weight_at,
)
from lora_fx.runtime import deployed

__all__ = [
    "become_layers",
    "check_deployed",
    "deployed_site",
    "measured",
    "requantized_site",
]


def requantized_site(
    change: Fold, old: torch.Tensor, weight: nn.Parameter, rounding: Rounding = NEAREST
) -> tuple[nn.Parameter, MergedSite]:
    """Return the merged weight in the old weight's format, with a single matrix in fp64 in between.

    Args:
        change: The changes to fold in.
        old: The values of the weight, in the layout of its site.
        weight: The quantized weight.
        rounding: The way in which it is rounded.

    Returns:
        The new parameter, and its row in the report.

    Raises:
        MergeError: If the format cannot hold the merged weight.
    """
    exact = change.exact(old)
    site = change.rows[0][0].site
    whole = Slice(site.axis, 0, site.applied(old).double(), site.applied(exact))
    values = exact.T if site.turned else exact
    how = "nearest"
    try:
        parameter = requantized(values, weight)
        grid = known.grid(held(parameter)) if (known := format_of(parameter)) else None
        feedback = None if grid is None else rounding.round(exact, grid, change.sites)
        if known is not None and feedback is not None:
            parameter = known.fill(feedback.T if site.turned else feedback, held(parameter))
            how = rounding.name
    except QuantizationError as error:
        raise MergeError(
            f"{change.name}: the merged weight cannot be quantized as it was: {error}. "
            "Merge without requantize=True: the result is dense then"
        ) from error
    after = dense(parameter, torch.float64)
    rounding_loss = _relative(after - values, values)
    merged = after.T if site.turned else after
    survival = measure_survival((whole,), merged, change.sites, rounding.moments)
    survival = dataclasses.replace(survival, max_ulp=math.nan)
    return parameter, _row(change, survival, rounding_loss, how)


def measured(
    change: Fold | TokenFold,
    slices: Iterable[Slice],
    merged: torch.Tensor,
    *,
    exhaustive: bool,
    rounding: Rounding = NEAREST,
    nearest: bool = True,
) -> MergedSite:
    """Return the row of a merged weight in the report.

    Args:
        change: Its changes.
        slices: Parts of the weight before, from ``change.slices``.
        merged: The weight after.
        exhaustive: True if the parts are the whole weight.
        rounding: The way in which weights are rounded.
        nearest: True if this one was rounded to nearest.
    """
    survival = measure_survival(slices, merged, change.sites, rounding.moments)
    if not exhaustive or not nearest:
        survival = dataclasses.replace(survival, max_ulp=math.nan)
    return _row(change, survival, rounding="nearest" if nearest else rounding.name)


def _row(
    change: Fold | TokenFold,
    survival: Survival,
    requantization_error: float = math.nan,
    rounding: str = "nearest",
) -> MergedSite:
    return MergedSite(
        change.name,
        change.adapters,
        survival.max_ulp,
        survival.relative_change,
        requantization_error,
        survival.kept,
        survival.moved,
        survival.output_error,
        survival.change,
        rounding,
    )


@torch.no_grad()
def deployed_site(
    model: nn.Module, row: PlannedSite, adapter: str, dtype: torch.dtype | None
) -> tuple[torch.Tensor, MergedSite]:
    """Return a merged weight as it was trained to be stored, and its row in the report.

    It is computed by the function that the forward calls, from the same tensors.

    Args:
        model: The rewritten model.
        row: The site.
        adapter: The adapter.
        dtype: The dtype of a dense result; by default that of the weight.

    Raises:
        MergeError: If the storage cannot hold the weight.
    """
    assert row.deploy is not None
    weight = weight_at(model, row.site.weight)
    if quantization_of(weight) is None:
        weight = gathered(weight, row.site.weight)
    turned = row.site.layout == "in_out" and not row.site.turned
    matrix = weight.T if turned else weight
    a, b = (gathered(factor) for factor in factors_of(model, row, adapter).pair)
    stored = deployed.deployed_weight(matrix, a, b, row.scale, row.deploy)
    before = dense(matrix, torch.float64)
    exact = deployed.adapted_weight(before, a, b, row.scale)
    values = dense(stored, torch.float64)
    if not torch.isfinite(values).all():
        raise MergeError(
            f"{row.name}: {row.deploy.format} cannot hold the merged weight: not all of its values are finite"
        )
    change, loss = _relative(exact - before, before), _relative(values - exact, exact)
    if row.deploy.dtype is not None:
        stored = stored.to(dtype or weight.dtype)
        stored = (stored.T if turned else stored).contiguous()
    return stored, MergedSite(
        row.name, (adapter,), math.nan, change, loss, deployed=row.deploy.format
    )


def become_layers(result: nn.Module, targets: Iterable[PlannedSite]) -> None:
    """Turn layers whose weight was dense in the base, and is stored in a format now, into those of a library.

    Args:
        result: The merged model.
        targets: The sites that were trained for a storage.
    """
    rows = [row for row in targets if row.deploy and not (row.deploy.dtype or row.deploy.as_base)]
    if not rows:
        return
    before = quantized_weights(result).keys() - {row.site.weight for row in rows}
    for row in rows:
        assert row.deploy is not None
        owner, options = result.get_submodule(row.site.owner), deployment_options(row.deploy)
        options.made_by.layers.become(owner, options)
        follow_state(owner, row.site.parameter, layer=True)
    stored = quantization_of(result.get_parameter(rows[0].site.weight))
    assert stored is not None
    if not before:
        sites = [row.site for row in rows]
        options.made_by.layers.describe_model(result, options, sites, stored.dtype)


def check_deployed(
    targets: Iterable[PlannedSite], into: nn.Module | None, dtype: torch.dtype | None
) -> None:
    """Raise for arguments of a merge that change the model that was trained.

    Raises:
        MergeError: If weights were trained for a storage, and ``into`` or ``dtype`` exclude it.
    """
    for target in filter(None, (row.deploy for row in targets)):
        if into is not None:
            raise MergeError(
                f"into has other weights than those that were trained for {target.format}: leave it out, "
                "since the merge gives the model that was trained"
            )
        if dtype is None:
            continue
        if target.dtype is None or torch.promote_types(dtype, target.dtype) != dtype:
            raise MergeError(
                f"dtype={dtype}: the weights were trained for {target.format}, and would be rounded again: "
                "leave it out, since the merge stores them in that form"
            )


def _relative(difference: torch.Tensor, to: torch.Tensor) -> float:
    """Return the Frobenius norm of a difference, relative to that of another tensor."""
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / to.norm().clamp_min(tiny))
