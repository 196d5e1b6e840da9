"""Fold adapters into weights, and return a model of the user's own class."""

from __future__ import annotations

from lora_fx.passes.merge import merging
from lora_fx.passes.merge.dense import KEPT_IN_FP32, cast, check_dtype, forget_loader, stripped
from lora_fx.passes.merge.fold import delta_weight
from lora_fx.passes.merge.merging import Changes, MergeReport, changes_of, merge
from lora_fx.passes.merge.rounding import MergedSite, OutputError, compared, rounded, ulp

__all__ = [
    "KEPT_IN_FP32",
    "Changes",
    "MergeReport",
    "MergedSite",
    "OutputError",
    "cast",
    "changes_of",
    "check_dtype",
    "compared",
    "delta_weight",
    "forget_loader",
    "merge",
    "merging",
    "rounded",
    "stripped",
    "ulp",
]
