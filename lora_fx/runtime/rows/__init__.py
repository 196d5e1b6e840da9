"""Batches whose samples have different adapters: their tables, tracking, products and parameters."""

from __future__ import annotations

from lora_fx.runtime.rows import banked, fused_rows
from lora_fx.runtime.rows.call_tokens import active_positions, gated, unwatch_tokens, watch_tokens
from lora_fx.runtime.rows.routing import routed
from lora_fx.runtime.rows.row_parameters import RowParameter
from lora_fx.runtime.rows.row_rules import is_elementwise
from lora_fx.runtime.rows.row_tracking import Follower
from lora_fx.runtime.rows.sample_calls import (
    ignore_ids,
    refuse_ids,
    tensors_in,
    unwatch_calls,
    watch_calls,
)
from lora_fx.runtime.rows.samples import (
    COLUMNS,
    IDS,
    SampleRows,
    SampleSlots,
    add_rows,
    ends_selected,
    follow,
    like_rows,
    put_rows,
    rows_added,
    rows_of_tokens,
    rows_selected,
    select_rows,
    unfollow,
    unseen,
)
from lora_fx.runtime.rows.token_rows import PatchedWeight

__all__ = [
    "COLUMNS",
    "IDS",
    "Follower",
    "PatchedWeight",
    "RowParameter",
    "SampleRows",
    "SampleSlots",
    "active_positions",
    "add_rows",
    "banked",
    "ends_selected",
    "follow",
    "fused_rows",
    "gated",
    "ignore_ids",
    "is_elementwise",
    "like_rows",
    "put_rows",
    "refuse_ids",
    "routed",
    "rows_added",
    "rows_of_tokens",
    "rows_selected",
    "select_rows",
    "tensors_in",
    "unfollow",
    "unseen",
    "unwatch_calls",
    "unwatch_tokens",
    "watch_calls",
    "watch_tokens",
]
