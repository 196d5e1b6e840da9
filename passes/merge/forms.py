"""Compute merged weights as they are stored: rounded, quantized again, or as the adapter was trained for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import (
    DtypeGrid,
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
from lora_fx.passes.merge.fold import Fold, TokenFold, is_finite
from lora_fx.passes.merge.rounding import MergedSite
from lora_fx.passes.merge.survival import Slice, Survival, measure_survival
from lora_fx.passes.parameters import (
    factors_of,
    gathered,
    weight_at,
)
from lora_fx.runtime.kernels import deployed

__all__ = [
    "become_layers",
    "check_deployed",
    "deployed_site",
    "requantized_site",
    "rounded_site",
    "rounded_weight",
]

_SAMPLED = 1 << 16
"""Entries of a weight whose change is measured, unless all are to be measured."""


def requantized_site(
    change: Fold, old: torch.Tensor, weight: nn.Parameter, rounding: Rounding = NEAREST
) -> tuple[nn.Parameter, MergedSite]:
    """Return the merged weight, quantized again in the format of the old weight.

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
    return parameter, _row(change, survival, rounding_loss, how)


def rounded_site(
    change: Fold | TokenFold,
    old: torch.Tensor,
    dtype: torch.dtype,
    rounding: Rounding,
    *,
    measure: bool,
    in_place: bool = False,
) -> tuple[torch.Tensor, MergedSite]:
    """Return the merged weight in a dtype, and its row in the report.

    Args:
        change: The changes to fold in.
        old: The weight before.
        dtype: The dtype of the result.
        rounding: The way in which it is rounded.
        measure: True to compare every merged element with fp64, not only a sample.
        in_place: True to overwrite the old weight, which ``change.check`` has accepted.

    Raises:
        MergeError: If the merged weight overflows.
    """
    slices: Iterable[Slice] = change.slices(old, dtype, None if measure else _SAMPLED)
    chosen = _not_to_nearest(change, old, dtype, rounding)
    if in_place:
        slices, merged = tuple(slices), old  # read the slices before they are overwritten
        change.fold_into(merged) if chosen is None else merged.copy_(chosen)
    else:
        merged = change.folded(old, dtype) if chosen is None else chosen
    name = "nearest" if chosen is None else rounding.name
    ulps = measure and chosen is None
    survival = measure_survival(slices, merged, change.sites, rounding.moments, ulps=ulps)
    return merged, _row(change, survival, rounding=name)


def rounded_weight(
    change: Fold | TokenFold, old: torch.Tensor, dtype: torch.dtype, rounding: Rounding
) -> torch.Tensor:
    """Return the merged weight in a dtype, as :func:`rounded_site` does, but without its row in the report.

    Args:
        change: The changes to fold in.
        old: The weight before.
        dtype: The dtype of the result.
        rounding: The way in which it is rounded.

    Raises:
        MergeError: If the merged weight overflows.
    """
    chosen = _not_to_nearest(change, old, dtype, rounding)
    return change.folded(old, dtype) if chosen is None else chosen


def _not_to_nearest(
    change: Fold | TokenFold, old: torch.Tensor, dtype: torch.dtype, rounding: Rounding
) -> torch.Tensor | None:
    """Return the merged weight under compensated or stochastic rounding; None for rounding to nearest.

    Trained rows and dtypes of more than 16 bits are always rounded to nearest.
    """
    if rounding.name == "nearest" or isinstance(change, TokenFold) or dtype.itemsize > 2:
        return None
    values = rounding.round(change.exact(old, dtype), DtypeGrid(dtype), change.sites)
    if values is None:
        return None
    result = values.to(dtype)
    if not is_finite(result) and is_finite(old):
        raise MergeError(
            f"{change.name}: the merged weight overflows {dtype}; merge in a wider dtype"
        )
    return result


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
    """Turn layers into a library's quantized layers, if their merged weight is stored in its format.

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
    """Raise if ``into`` or ``dtype`` would make a merge store other weights than those that were trained.

    Raises:
        MergeError: If weights were trained for a storage, and ``into`` or ``dtype`` exclude that storage.
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
    """Return the Frobenius norm of a difference, divided by the norm of the tensor ``to``."""
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / to.norm().clamp_min(tiny))
