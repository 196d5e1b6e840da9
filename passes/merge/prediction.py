"""Predict how large a change has to be to survive a merge, before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from lora_fx.formats import Storage, dense, deployment, deployment_options, stored
from lora_fx.ir import Plan, PlannedSite
from lora_fx.passes.merge.compensated import matrix_of
from lora_fx.passes.parameters import gathered, weight_at

__all__ = ["least_change", "with_prediction"]

_ROWS = 64
"""Rows of a weight that are rounded for the prediction."""
_KEPT = 0.9
_STEPS = 16


def with_prediction(plan: Plan, model: nn.Module, name: str) -> Plan:
    """Return a plan in which each site has ``least_change``: the smallest change that a merge keeps.

    It stays None for weights on the meta device, and for operations that are no product with a matrix.

    Args:
        plan: The plan.
        model: The model of the plan.
        name: "bf16", "fp16", or a format of :func:`lora_fx.quantize`.

    Raises:
        ConfigError: If there is no such storage.
        QuantizationError: If its library is missing.
    """
    how = deployment(name, "merge_into")
    options = None if how.dtype is not None else deployment_options(how, "merge_into")
    rows = tuple(
        dataclasses.replace(row, least_change=_of_site(row, model, how.dtype, options))
        for row in plan.sites
    )
    return dataclasses.replace(plan, sites=rows, merge_into=name)


def _of_site(
    row: PlannedSite, model: nn.Module, dtype: torch.dtype | None, options: Storage | None
) -> float | None:
    weight = weight_at(model, row.site.weight)
    if weight.is_meta:
        return None
    matrix = matrix_of(row.site, dense(gathered(weight, row.site.weight), torch.float32))
    if matrix is None:
        return None
    sample = matrix[:: max(1, len(matrix) // _ROWS)][:_ROWS].contiguous()
    if options is None:
        return least_change(sample, lambda values: values.to(dtype).float())
    if options.objection((len(sample), sample.shape[1]), torch.float32) is not None:
        return None
    how = options
    return least_change(sample, lambda values: dense(stored(values, how), torch.float32))


def least_change(weight: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the smallest ``‖ΔW‖ / ‖W‖`` for which nine tenths of ΔW are left after rounding.

    ΔW has random normal entries. W is rounded first, as in a base model that is stored like the result. If W
    were not rounded first, small changes would be kept on average, but hidden by the errors of rounding.

    Args:
        weight: Rows of the weight, fp32.
        rounding: Rounds a matrix of this shape.
    """
    weight = rounding(weight)
    generator = torch.Generator(weight.device).manual_seed(0)
    change = torch.randn(weight.shape, generator=generator, device=weight.device)
    change *= weight.norm() / change.norm()
    low, high = -6.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        scaled = change * 10**middle
        left = float(((rounding(weight + scaled) - weight) * scaled).sum() / scaled.square().sum())
        low, high = (low, middle) if left >= _KEPT else (middle, high)
    return math.nan if high == 1.0 else 10**high
