"""Conversion of adapters whose initialization changed the base, for saving and loading.

On saving, such an adapter is converted to one over the original base: with A₀ and B₀ for the start,
``W₀ + s·B A = W + s·(B A - B₀ A₀) = W + s·[B, -B₀] [A; A₀]``. The rank doubles, and so does alpha (times √2
with ``use_rslora``), so that the scale stays. The only difference left is the rounding of
``W₀ = W - s·B₀ A₀`` to the weight's dtype. LoftQ's base does not differ by a product of that rank. Its
folder therefore says ``loftq``, and the base is quantized again when it is loaded, as in PEFT.

On loading, PEFT's folders that were not converted say ``pissa`` or ``olora``. The same start is subtracted
from the base again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import adapter_record, restart
from lora_fx.checkpoint.keys import Slot
from lora_fx.config import LoraConfig, changes_base, needs_data
from lora_fx.errors import CheckpointError
from lora_fx.ir import AdapterRecord, PlannedSite, Site, join
from lora_fx.passes.insert import start_factors
from lora_fx.passes.parameters import factor_names, gathered
from lora_fx.passes.plan import start_objection

__all__ = ["Converted", "check_start", "converted", "other_start", "repeat_start"]

_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class Converted:
    """An adapter relative to the original base.

    Attributes:
        record: The record, with the ranks and alphas after conversion.
        slots: Slots by key, with the start joined to the factors.
        rows: Factors whose start was subtracted from the base, by FQN: the site, the start to join to the
            factor, and True for B.
    """

    record: AdapterRecord
    slots: dict[str, Slot]
    rows: Mapping[str, tuple[PlannedSite, torch.Tensor, bool]]

    def parted(
        self, slots: Mapping[str, Slot], values: Iterable[tuple[Slot, torch.Tensor]]
    ) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
        """Split saved values into values for the model's own slots, without the joined start.

        Args:
            slots: The model's own slots, by key.
            values: Values for the slots after conversion.

        Returns:
            The model's slots with their values, and a text for each start that is not the start of the model.
        """
        own_values: list[tuple[Slot, torch.Tensor]] = []
        problems: list[str] = []
        for slot, value in values:
            if slot.name not in self.rows:
                own_values.append((slot, value))
                continue
            row, start, is_b = self.rows[slot.name]
            own, other = _split(row.site, value, is_b)
            own_values.append((slots[slot.key], own))
            if not torch.equal(other.to(start), start):
                problems.append(
                    f"start: {slot.key} has another start beside it than the model's adapter has, so that "
                    "they are not of the same base: save it with lora_fx.save_adapter, and load it onto the "
                    "original model"
                )
        return own_values, problems


def converted(
    model: nn.Module, record: AdapterRecord, adapter: str, slots: Mapping[str, Slot]
) -> Converted:
    """Convert an adapter whose initialization changed the base to an adapter of the original base.

    Sites whose initialization did not change the base are unchanged.

    Args:
        model: A rewritten model.
        record: The adapter's record.
        adapter: Its name.
        slots: The adapter's slots in the model, by key.
    """
    rows: list[PlannedSite] = []
    joined: dict[str, torch.Tensor] = {}
    beside: dict[str, tuple[PlannedSite, torch.Tensor, bool]] = {}
    for row in record.sites:
        start = start_factors(model, row, adapter)
        if start is None:
            rows.append(row)
            continue
        more = math.sqrt(2) if record.config.use_rslora else 2.0
        rows.append(dataclasses.replace(row, rank=2 * row.rank, alpha=row.alpha * more))
        for name, old, is_b in zip(factor_names(row).pair, start, (False, True), strict=True):
            own = join(row.site.holder, name, adapter)
            new, old = gathered(model.get_parameter(own)), gathered(old)
            old = -old if is_b else old
            beside[own] = (row, old, is_b)
            joined[own] = _side_by_side(row.site, new, old, is_b)
    changed = {
        key: dataclasses.replace(slot, tensor=joined.get(slot.name, slot.tensor))
        for key, slot in slots.items()
    }
    return Converted(dataclasses.replace(record, sites=tuple(rows)), changed, beside)


def _side_by_side(site: Site, new: torch.Tensor, old: torch.Tensor, is_b: bool) -> torch.Tensor:
    """Concatenate two factors along the rank, within each expert or group."""
    if is_b:
        return torch.cat([new, old], 2 if site.experts else 1)
    if site.experts:
        return torch.cat([new, old], 1)
    groups = [torch.unflatten(factor, 0, (site.groups, -1)) for factor in (new, old)]
    return torch.cat(groups, 1).flatten(0, 1)


def _split(site: Site, whole: torch.Tensor, is_b: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a joined factor into the two factors that :func:`_side_by_side` concatenated."""
    if is_b or site.experts:
        first, last = whole.chunk(2, (2 if site.experts else 1) if is_b else 1)
        return first, last
    by_group = whole.unflatten(0, (site.groups, 2, -1))  # type: ignore[no-untyped-call]
    first, last = by_group.unbind(1)
    return first.flatten(0, 1), last.flatten(0, 1)


def check_start(config: LoraConfig, folder: Path) -> None:
    """Raise if the folder of an adapter does not tell how its initialization changed the base.

    Raises:
        CheckpointError: If the initialization used data, which the folder does not have.
    """
    start = config.init_lora_weights
    if changes_base(start) and needs_data(start):
        raise CheckpointError(
            f"{folder}: init_lora_weights is {start!r}, which changed the base model's weights according to "
            "data that the folder does not hold. In PEFT, save it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...); or, if the model that you "
            "give has the changed weights, write true for init_lora_weights in adapter_config.json"
        )
    if "_niter_" in str(start):
        _log.warning(
            "%s: %s is approximate and random: the base is not changed by quite the same as when the adapter "
            "was trained. Converted (path_initial_model_for_weight_conversion in PEFT) it would be exact",
            folder,
            start,
        )


def repeat_start(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Initialize a new adapter as its configuration says, if that changes the base (PiSSA, OLoRA).

    A folder of PEFT holds factors for the changed base.

    Raises:
        CheckpointError: If PEFT's start cannot be reproduced at a site. The model is unchanged then.
    """
    if not changes_base(config.init_lora_weights):
        return
    record = adapter_record(model, adapter_name)
    # PEFT gives embeddings a plain start regardless of the configuration.
    rows = tuple(row for row in record.sites if row.site.family != "embedding")
    for row in rows:
        reason = start_objection(row.site, row.rank, config)
        if config.init_lora_weights == "olora" and row.site.layout == "in_out":
            reason = "PEFT decomposes a weight that is stored [in, out] the other way round"
        if reason is not None:
            raise CheckpointError(f"{row.name}: {reason}")
    exact = dataclasses.replace(record.config, **_starting(config))
    restart(model, adapter_name, dataclasses.replace(record, config=exact), rows)


def other_start(record: AdapterRecord, config: LoraConfig) -> list[str]:
    """Return a problem if an adapter in a folder and one in a model have different bases, else nothing."""
    ours, theirs = record.config, config
    own = set(record.own) - set(record.given)
    changed = bool({row.site.weight for row in record.sites} & own)
    if not changed and not changes_base(theirs.init_lora_weights):
        return []
    if changed and _starting(ours) == _starting(theirs):
        return []
    own_start = ours.init_lora_weights if changed else True
    reason = (
        f"start: the folder's adapter started as init_lora_weights={theirs.init_lora_weights!r}, the model's "
        f"as {own_start!r}, and so they are not of the same base: load it onto the original model"
    )
    return [reason]


def _starting(config: LoraConfig) -> dict[str, Any]:
    start = config.init_lora_weights
    return {
        # Starts that do not change the base make no difference here.
        "init_lora_weights": start if changes_base(start) else True,
        "loftq_config": config.loftq_config,
    }
