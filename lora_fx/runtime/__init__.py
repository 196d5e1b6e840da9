"""What runs in a rewritten model: products with branches, masks, norms, logits, rows, the watch."""

from __future__ import annotations

from lora_fx.runtime import (
    attention,
    banked,
    experts,
    fused_lora,
    fused_rows,
    logits,
    masks,
    ops,
    parts,
    recompute,
    watch,
)
from lora_fx.runtime.classes import (
    BASE,
    around,
    give_class,
    inner_class,
    inner_of,
    subclass,
)
from lora_fx.runtime.fused_lora import without_autocast
from lora_fx.runtime.ops import (
    AdapterDropouts,
    AdapterFactors,
    AdapterModule,
    Holder,
    KeptTensors,
    check_adapter_name,
    in_place,
    output_padding,
)
from lora_fx.runtime.parts import called_by_all, check_equal
from lora_fx.runtime.row_tracking import Follower
from lora_fx.runtime.samples import (
    IDS,
    SampleRows,
    add_rows,
    follow,
    ignore_ids,
    put_rows,
    select_rows,
    unfollow,
    unwatch_calls,
    watch_calls,
)
from lora_fx.runtime.watch import CODES, GRAPH, Hooked, disarm, entry, is_checked

__all__ = [
    "BASE",
    "CODES",
    "GRAPH",
    "IDS",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "Follower",
    "Holder",
    "Hooked",
    "KeptTensors",
    "SampleRows",
    "add_rows",
    "around",
    "attention",
    "banked",
    "called_by_all",
    "check_adapter_name",
    "check_equal",
    "disarm",
    "entry",
    "experts",
    "follow",
    "fused_lora",
    "fused_rows",
    "give_class",
    "ignore_ids",
    "in_place",
    "inner_class",
    "inner_of",
    "is_checked",
    "logits",
    "masks",
    "ops",
    "output_padding",
    "parts",
    "put_rows",
    "recompute",
    "select_rows",
    "subclass",
    "unfollow",
    "unwatch_calls",
    "watch",
    "watch_calls",
    "without_autocast",
]
