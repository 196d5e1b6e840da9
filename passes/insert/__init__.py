"""Passes that add factors to a model and branches to its graphs."""

from __future__ import annotations

from lora_fx.passes.insert.add_factors import (
    AddFactors,
    computed_starts,
    drop_site,
    place_slots,
    place_start,
    slot_start,
    start_factors,
)
from lora_fx.passes.insert.insert_branches import Insert, See, observed
from lora_fx.passes.insert.select_rows import ROWS, SelectRows
from lora_fx.passes.insert.starts import (
    Start,
    data_start,
    initial_start,
    pissa,
    signs,
    site_generator,
    with_seed,
)
from lora_fx.passes.insert.trained_whole import AddTokens, TrainTokens, Unfreeze

__all__ = [
    "ROWS",
    "AddFactors",
    "AddTokens",
    "Insert",
    "See",
    "SelectRows",
    "Start",
    "TrainTokens",
    "Unfreeze",
    "computed_starts",
    "data_start",
    "drop_site",
    "initial_start",
    "observed",
    "pissa",
    "place_slots",
    "place_start",
    "signs",
    "site_generator",
    "slot_start",
    "start_factors",
    "with_seed",
]
