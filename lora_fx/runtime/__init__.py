"""What runs in a rewritten model: products with branches, masks, norms, rows of a batch, the watch."""

from __future__ import annotations

from lora_fx.runtime import (
    attention,
    experts,
    fused_lora,
    fused_quantized,
    masks,
    ops,
    parts,
    watch,
    windows,
)
from lora_fx.runtime.classes import BASE, give_class, inner_class, subclass
from lora_fx.runtime.decorators import around, inner_of
from lora_fx.runtime.fused_lora import without_autocast
from lora_fx.runtime.members import members_of, register_member
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
from lora_fx.runtime.processes import called_by_all, check_equal
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
    "called_by_all",
    "check_adapter_name",
    "check_equal",
    "disarm",
    "entry",
    "experts",
    "fused_lora",
    "fused_quantized",
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
    "register_member",
    "select_rows",
    "subclass",
    "unwatch_calls",
    "watch",
    "watch_calls",
    "windows",
    "without_autocast",
]
