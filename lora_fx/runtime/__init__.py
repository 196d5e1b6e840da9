"""What runs in a rewritten model: products with branches, masks, norms, rows of a batch, the watch."""

from __future__ import annotations

from lora_fx.runtime import (
    attention,
    experts,
    fused_lora,
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
    members_of,
    register_member,
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
from lora_fx.runtime.samples import (
    SampleRows,
    add_rows,
    put_rows,
    select_rows,
    unwatch_calls,
    watch_calls,
)
from lora_fx.runtime.watch import CODES, GRAPH, Hooked, disarm, entry, is_checked

__all__ = [
    "BASE",
    "CODES",
    "GRAPH",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "Holder",
    "Hooked",
    "KeptTensors",
    "SampleRows",
    "add_rows",
    "around",
    "attention",
    "check_adapter_name",
    "disarm",
    "entry",
    "experts",
    "fused_lora",
    "give_class",
    "in_place",
    "inner_class",
    "inner_of",
    "is_checked",
    "masks",
    "members_of",
    "ops",
    "output_padding",
    "parts",
    "put_rows",
    "recompute",
    "register_member",
    "select_rows",
    "subclass",
    "unwatch_calls",
    "watch",
    "watch_calls",
    "without_autocast",
]
