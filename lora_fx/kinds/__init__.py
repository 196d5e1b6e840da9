"""Adapter kinds: what is trained at a site, what it computes and changes, and what that costs."""

from __future__ import annotations

from lora_fx.kinds.base import (
    AdapterKind,
    Costs,
    Slot,
    Starting,
    along,
    chosen_kind,
    is_plain,
    kind_objection,
    kind_of,
    kind_with,
    kinds,
    register_adapter_kind,
    union_of,
)

__all__ = [
    "AdapterKind",
    "Costs",
    "Slot",
    "Starting",
    "along",
    "chosen_kind",
    "is_plain",
    "kind_objection",
    "kind_of",
    "kind_with",
    "kinds",
    "register_adapter_kind",
    "union_of",
]
