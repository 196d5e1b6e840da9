"""Code that runs in a rewritten model: products with branches, masks, norms, logits, rows, the watch."""

from __future__ import annotations

from lora_fx.runtime import (
    attention,
    banked,
    branch,
    deployed,
    experts,
    fused_lora,
    fused_rows,
    logits,
    masks,
    parts,
    recompute,
    watch,
)
from lora_fx.runtime.adapter_modules import (
    AdapterDropouts,
    AdapterFactors,
    AdapterModule,
    AdapterState,
    Holder,
    KeptIndices,
    KeptTensors,
    check_adapter_name,
)
from lora_fx.runtime.call_tokens import active_positions, gated, unwatch_tokens, watch_tokens
from lora_fx.runtime.captured import in_place, output_padding
from lora_fx.runtime.classes import (
    BASE,
    Blank,
    around,
    blank,
    give_class,
    held_in,
    inner_class,
    inner_of,
    subclass,
)
from lora_fx.runtime.effective import CHANGES, EffectiveWeight, base_parameter
from lora_fx.runtime.fused_lora import without_autocast
from lora_fx.runtime.parts import called_by_all, check_equal
from lora_fx.runtime.routing import routed
from lora_fx.runtime.row_parameters import RowParameter
from lora_fx.runtime.row_tracking import Follower
from lora_fx.runtime.sample_calls import ignore_ids, tensors_in, unwatch_calls, watch_calls
from lora_fx.runtime.samples import (
    COLUMNS,
    IDS,
    SampleRows,
    add_rows,
    ends_selected,
    follow,
    put_rows,
    rows_added,
    rows_of_tokens,
    rows_selected,
    select_rows,
    unfollow,
)
from lora_fx.runtime.spans import LazyTensor, Source, lazy_result
from lora_fx.runtime.token_rows import PatchedWeight
from lora_fx.runtime.watch import CODE, GRAPH, Hooked, disarm, entry, is_checked, places_of

__all__ = [
    "BASE",
    "CHANGES",
    "CODE",
    "COLUMNS",
    "GRAPH",
    "IDS",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "AdapterState",
    "Blank",
    "EffectiveWeight",
    "Follower",
    "Holder",
    "Hooked",
    "KeptIndices",
    "KeptTensors",
    "LazyTensor",
    "PatchedWeight",
    "RowParameter",
    "SampleRows",
    "Source",
    "active_positions",
    "add_rows",
    "around",
    "attention",
    "banked",
    "base_parameter",
    "blank",
    "branch",
    "called_by_all",
    "check_adapter_name",
    "check_equal",
    "deployed",
    "disarm",
    "ends_selected",
    "entry",
    "experts",
    "follow",
    "fused_lora",
    "fused_rows",
    "gated",
    "give_class",
    "held_in",
    "ignore_ids",
    "in_place",
    "inner_class",
    "inner_of",
    "is_checked",
    "lazy_result",
    "logits",
    "masks",
    "output_padding",
    "parts",
    "places_of",
    "put_rows",
    "recompute",
    "routed",
    "rows_added",
    "rows_of_tokens",
    "rows_selected",
    "select_rows",
    "subclass",
    "tensors_in",
    "unfollow",
    "unwatch_calls",
    "unwatch_tokens",
    "watch",
    "watch_calls",
    "watch_tokens",
    "without_autocast",
]
