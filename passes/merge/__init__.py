"""Fold adapters into weights, and return a model of the user's own class."""

from __future__ import annotations

from lora_fx.passes.merge import merging
from lora_fx.passes.merge.compensated import NEAREST, Rounding, RoundingName, is_matrix_product
from lora_fx.passes.merge.dense import (
    KEPT_IN_FP32,
    Keep,
    cast,
    check_dtype,
    forget_loader,
    stripped,
)
from lora_fx.passes.merge.fold import delta_weight
from lora_fx.passes.merge.forms import rounded_site
from lora_fx.passes.merge.merging import (
    Changes,
    MergeReport,
    Storage,
    changes_of,
    merge,
    rows_of_report,
    warn_of_loss,
)
from lora_fx.passes.merge.prediction import with_prediction
from lora_fx.passes.merge.rounding import MergedSite, OutputError, rounded, ulp

__all__ = [
    "KEPT_IN_FP32",
    "NEAREST",
    "Changes",
    "Keep",
    "MergeReport",
    "MergedSite",
    "OutputError",
    "Rounding",
    "RoundingName",
    "Storage",
    "cast",
    "changes_of",
    "check_dtype",
    "delta_weight",
    "forget_loader",
    "is_matrix_product",
    "merge",
    "merging",
    "rounded",
    "rounded_site",
    "rows_of_report",
    "stripped",
    "ulp",
    "warn_of_loss",
    "with_prediction",
]
