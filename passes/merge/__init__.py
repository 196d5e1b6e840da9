"""Fold adapters into weights, and return a model of the user's own class."""

from __future__ import annotations

from lora_fx.passes.merge import merging
from lora_fx.passes.merge.compensated import NEAREST, Rounding, RoundingName, is_matrix_product
from lora_fx.passes.merge.dense import KEPT_IN_FP32, forget_loader, stripped
from lora_fx.passes.merge.fold import delta_weight
from lora_fx.passes.merge.merging import MergeReport, merge
from lora_fx.passes.merge.rounding import OutputError, rounded, ulp

__all__ = [
    "KEPT_IN_FP32",
    "NEAREST",
    "MergeReport",
    "OutputError",
    "Rounding",
    "RoundingName",
    "delta_weight",
    "forget_loader",
    "is_matrix_product",
    "merge",
    "merging",
    "rounded",
    "stripped",
    "ulp",
]
