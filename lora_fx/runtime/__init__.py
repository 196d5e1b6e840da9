"""What runs in a rewritten model: products with branches, masks, norms, rows of a batch, the watch."""

from __future__ import annotations

from lora_fx.runtime import dora, experts, watch
from lora_fx.runtime.attention import attend, causal_hint, zero_padding
from lora_fx.runtime.classes import BASE, give_class, inner_class, subclass
from lora_fx.runtime.decorators import around, inner_of
from lora_fx.runtime.dora import spread
from lora_fx.runtime.experts import (
    grouped_mm,
    repeated,
    sorted_by_expert,
    summed,
    tokens_of,
    unsorted,
)
from lora_fx.runtime.fused_dora import dora_linear
from lora_fx.runtime.fused_lora import lora_linear, lora_linears, without_autocast
from lora_fx.runtime.fused_quantized import quantized_lora_linear
from lora_fx.runtime.masks import dropped
from lora_fx.runtime.members import members_of, register_member
from lora_fx.runtime.ops import (
    OMITTED,
    AdapterFactors,
    AdapterModule,
    Callee,
    HeldTensor,
    Holder,
    KeptIndices,
    KeptTensors,
    Seen,
    cast_like,
    check_adapter_name,
    class_of,
    count_batch,
    differs,
    given,
    in_place,
    needs_modules,
    output_padding,
    pad_features,
    tree_differs,
    wants_cache,
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
from lora_fx.runtime.windows import (
    attend_in_windows,
    fitted_window,
    partition,
    reverse,
    without_key_bias,
)

__all__ = [
    "BASE",
    "CODES",
    "GRAPH",
    "OMITTED",
    "AdapterFactors",
    "AdapterModule",
    "Callee",
    "HeldTensor",
    "Holder",
    "Hooked",
    "KeptIndices",
    "KeptTensors",
    "SampleRows",
    "Seen",
    "add_rows",
    "around",
    "attend",
    "attend_in_windows",
    "cast_like",
    "causal_hint",
    "check_adapter_name",
    "class_of",
    "count_batch",
    "differs",
    "disarm",
    "dora",
    "dora_linear",
    "dropped",
    "entry",
    "experts",
    "fitted_window",
    "give_class",
    "given",
    "grouped_mm",
    "in_place",
    "inner_class",
    "inner_of",
    "is_checked",
    "lora_linear",
    "lora_linears",
    "members_of",
    "needs_modules",
    "output_padding",
    "pad_features",
    "partition",
    "put_rows",
    "quantized_lora_linear",
    "register_member",
    "repeated",
    "reverse",
    "select_rows",
    "sorted_by_expert",
    "spread",
    "subclass",
    "summed",
    "tokens_of",
    "tree_differs",
    "unsorted",
    "unwatch_calls",
    "wants_cache",
    "watch",
    "watch_calls",
    "without_autocast",
    "without_key_bias",
    "zero_padding",
]
