"""The user's configuration: ``LoraConfig``, its fields and rules, and the names that it selects."""

from __future__ import annotations

from lora_fx.config.fields import (
    FrozenOptions,
    bad,
    changes_base,
    complete_options,
    needs_data,
    whole_number,
)
from lora_fx.config.lora_config import (
    ALL_LINEAR,
    CONFIG_NAME,
    LoraConfig,
    adapters_below,
    missing_adapter,
    read_json,
)
from lora_fx.config.selection import (
    Verdict,
    alpha_for,
    excluded,
    judge,
    nearest_names,
    parameter_entry,
    rank_for,
    saved_by,
    saved_entries,
    saved_module,
    scale_for,
    scale_of,
    unmatched,
    unmatched_saved,
    unmatched_targets,
    uses_default_targets,
)

__all__ = [
    "ALL_LINEAR",
    "CONFIG_NAME",
    "FrozenOptions",
    "LoraConfig",
    "Verdict",
    "adapters_below",
    "alpha_for",
    "bad",
    "changes_base",
    "complete_options",
    "excluded",
    "judge",
    "missing_adapter",
    "nearest_names",
    "needs_data",
    "parameter_entry",
    "rank_for",
    "read_json",
    "saved_by",
    "saved_entries",
    "saved_module",
    "scale_for",
    "scale_of",
    "unmatched",
    "unmatched_saved",
    "unmatched_targets",
    "uses_default_targets",
    "whole_number",
]
