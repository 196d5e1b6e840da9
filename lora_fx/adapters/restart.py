"""Gives an adapter of a rewritten model another start: of its weights again, or from data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lora_fx.adapters.switching import put_in, take_out
from lora_fx.ir.record import AdapterRecord, require_record
from lora_fx.ir.values import PlannedSite
from lora_fx.passes.insert.place_starts import computed_starts, place_start, place_variants
from lora_fx.passes.insert.starts import Start, initial_start
from lora_fx.passes.parameters.own import base_parameters, place_base

__all__ = ["restart"]


def restart(
    model: nn.Module,
    adapter_name: str,
    entry: AdapterRecord,
    rows: Iterable[PlannedSite],
    make: Callable[[PlannedSite, torch.Tensor], Start] | None = None,
) -> None:
    """Computes starts from the base as it was, and puts them in; all of them or none.

    Args:
        model: A rewritten model; changed in place, its graphs are not.
        adapter_name: An adapter of it, active or not.
        entry: What its record becomes, but for the weights that the starts change.
        rows: The sites that start anew.
        make: The start of a site, from its weight; by default what the entry's configuration says.
    """
    record = require_record(model)
    take_out(model, record)
    try:
        starts = computed_starts(
            model, rows, make or (lambda row, weight: initial_start(row, weight, entry.config))
        )
        before = base_parameters(model)
        for row, start in starts:
            place_start(model, row, adapter_name, start)
            place_variants(model, row, adapter_name, entry.config)
        after = base_parameters(model)
        own = [name for name, parameter in after.items() if parameter is not before[name]]
        originals = {**record.originals, **{name: before[name].detach() for name in own}}
        place_base(model, adapter_name, own, originals)
        entry = dataclasses.replace(entry, own=tuple(dict.fromkeys((*entry.own, *own))))
        adapters = {**record.adapters, adapter_name: entry}
        record = dataclasses.replace(record, adapters=adapters, originals=originals)
        model.__dict__["_lora_fx"] = record
    finally:
        put_in(model, record)
