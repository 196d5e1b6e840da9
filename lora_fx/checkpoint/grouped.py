"""Magnitudes of grouped convolutions as PEFT takes them.

PEFT (up to 0.21.2) divides the magnitude of a convolution by ``‖W + s·mm(B, A)‖`` with A [r, in, *k] and B
read as [out/g, r], whatever the groups: for one group that is the norm of the adapted weight, and for several
the elements of a product that nothing computes are added to those of W. The function that follows is right
for whatever gain comes out. So the magnitude is stored times the ratio of that number to the norm: PEFT
computes the gain that was trained, and a folder of PEFT's has the gain with which PEFT would run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.checkpoint.forms import Dense
from lora_fx.checkpoint.keys import Slot
from lora_fx.ir import AdapterRecord, PlannedSite, join
from lora_fx.kinds import kind_of
from lora_fx.passes.insert import start_factors
from lora_fx.passes.parameters import factor_names, gathered
from lora_fx.passes.patterns import pattern_of

__all__ = ["from_peft", "to_peft"]


def to_peft(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    slots: Mapping[str, Slot],
    tensors: dict[str, Tensor],
) -> None:
    """Puts magnitudes as PEFT takes them in the place of those of the model.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        slots: By key, what is stored: relative to the base as it was.
        tensors: By key, as they are stored.
    """
    known = {slot.name: gathered(slot.tensor) for slot in slots.values()} if _any(record) else {}
    ratios = dict(_ratios(model, record, adapter, known, whole=True))
    for key, value in tensors.items():
        if slots[key].name in ratios:
            ratio = ratios[slots[key].name].view_as(value)
            tensors[key] = (value.double() * ratio).to(value.dtype)


def from_peft(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    values: Sequence[tuple[Slot, Tensor]],
    whole: bool,
) -> list[tuple[Slot, Tensor]]:
    """The same the other way round.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        values: What was stored, for the slots of the model.
        whole: Whether the start of the adapter is in the factors, and not in the base.
    """
    known = {slot.name: value for slot, value in values}
    ratios = dict(_ratios(model, record, adapter, known, whole))
    return [
        (slot, (value.double() / ratios[slot.name].view_as(value)).to(value.dtype))
        if slot.name in ratios
        else (slot, value)
        for slot, value in values
    ]


def _any(record: AdapterRecord) -> bool:
    return any(_is_grouped(row) for row in record.sites)


def _is_grouped(row: PlannedSite) -> bool:
    # PEFT has no adapter for transposed convolutions.
    site = row.site
    return site.groups > 1 and site.layout == "out_in" and any(_normed(row))


def _normed(row: PlannedSite) -> tuple[str, ...]:
    """What is compared with the norm of the weight: a magnitude."""
    return tuple(slot.name for slot in kind_of(row).slots(row.site) if slot.normed)


def _ratios(
    model: nn.Module,
    record: AdapterRecord,
    adapter: str,
    known: Mapping[str, Tensor],
    whole: bool,
) -> Iterator[tuple[str, Tensor]]:
    """FQN of each magnitude, and PEFT's number by the norm, [out] in fp64."""
    for row in record.sites:
        if not _is_grouped(row):
            continue
        names = factor_names(row)
        a, b, magnitude = (
            join(row.site.holder, name, adapter) for name in (*names.pair, *_normed(row))
        )
        weight = gathered(model.get_parameter(row.site.weight))
        if not weight.is_meta and {a, b, magnitude} <= known.keys():
            given = (_exact(weight), _exact(known[a]), _exact(known[b]))
            start: Any = start_factors(model, row, adapter) if whole else None
            start = None if start is None else [_exact(gathered(one)) for one in start]
            yield magnitude, _ratio(row, *given, start)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _ratio(
    row: PlannedSite, weight: Tensor, a: Tensor, b: Tensor, start: Sequence[Tensor] | None
) -> Tensor:
    delta = pattern_of(row.site).delta
    if start is not None:
        weight = weight + row.scale * delta(row.site, *start)
    dense = Dense(row.site.groups).encode(a)
    mixed = (b.reshape(-1, len(a)) @ dense.flatten(1)).reshape(weight.shape)
    own, theirs = (
        (weight + row.scale * change).flatten(1).norm(dim=1)
        for change in (delta(row.site, a, b), mixed)
    )
    # A feature without weights has no gain in PEFT, whatever is stored.
    return torch.where((own > 0) & (theirs > 0), theirs / own, 1.0)
