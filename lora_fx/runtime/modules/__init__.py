"""Modules of adapters, classes that are created at run time, and branches over sharded tensors."""

from __future__ import annotations

from lora_fx.runtime.modules import parts
from lora_fx.runtime.modules.adapter_modules import (
    AdapterDropouts,
    AdapterFactors,
    AdapterModule,
    AdapterState,
    Holder,
    KeptIndices,
    KeptTensors,
    check_adapter_name,
)
from lora_fx.runtime.modules.call_sizes import Sizes
from lora_fx.runtime.modules.classes import (
    BASE,
    Blank,
    around,
    blank,
    give_class,
    held_in,
    inner_class,
    inner_of,
    members_of,
    subclass,
)
from lora_fx.runtime.modules.parts import (
    called_by_all,
    check_equal,
    check_not_in_parts,
    compute_in_parts,
    factor_beside,
    is_in_parts,
    own_part,
    summed_over_inputs,
)

__all__ = [
    "BASE",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "AdapterState",
    "Blank",
    "Holder",
    "KeptIndices",
    "KeptTensors",
    "Sizes",
    "around",
    "blank",
    "called_by_all",
    "check_adapter_name",
    "check_equal",
    "check_not_in_parts",
    "compute_in_parts",
    "factor_beside",
    "give_class",
    "held_in",
    "inner_class",
    "inner_of",
    "is_in_parts",
    "members_of",
    "own_part",
    "parts",
    "subclass",
    "summed_over_inputs",
]
