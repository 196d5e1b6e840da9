"""Whether the tensors of an adapter folder fit a model: in words, every way they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_fx.checkpoint.keys import Slot, base_name
from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import scale_for
from lora_fx.errors import CheckpointError
from lora_fx.ir.record import AdapterRecord
from lora_fx.passes.parameters.own import parameter_of

__all__ = ["leftover", "other_scales", "values_for"]


def values_for(
    slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor]
) -> tuple[list[tuple[Slot, torch.Tensor]], list[str]]:
    """What to write where, and what is wrong with it; nothing is written yet."""
    values: dict[str, tuple[Slot, torch.Tensor]] = {}
    problems: list[str] = []
    seen: set[str] = set()
    for key, slot in slots.items():
        stored = tensors.get(key)
        if stored is None:
            continue
        seen.add(slot.name)
        if tuple(stored.shape) != slot.shape:
            problems.append(_shapes(key, stored, slot.shape))
            continue
        try:
            value = slot.form.decode(stored)
        except CheckpointError as error:
            problems.append(f"not representable: {key} {error}")
            continue
        if slot.name in values and not torch.equal(values[slot.name][1], value):
            problems.append(
                f"contradiction: {key} is another name for {slot.name}, with other values"
            )
        elif slot.tensor.is_meta:
            problems.append(
                f"no place: {slot.name} is on the meta device; give the model its weights first"
            )
        else:
            values[slot.name] = (slot, value)
    problems += [
        f"missing: {slot.key} {list(slot.shape)}"
        for slot in slots.values()
        if slot.required and not slot.alias and slot.name not in seen
    ]
    return list(values.values()), problems


def other_scales(record: AdapterRecord, config: LoraConfig, names: Mapping[str, str]) -> list[str]:
    """A model that was rewritten before has its scales in the graph.

    Args:
        record: The adapter in the model.
        config: The configuration of the folder.
        names: By what it looks up the scale of a site, where that is not the site's name.
    """
    found = {row.name: scale_for(names.get(row.name, row.name), config) for row in record.sites}
    return [
        f"scale: {row.name} is scaled by {found[row.name]:g} in the folder, by "
        f"{row.scale:g} in the model: load the adapter onto the original model"
        for row in record.sites
        if abs(found[row.name] - row.scale) > 1e-9 * abs(row.scale)
    ]


def leftover(
    key: str, value: torch.Tensor, model: nn.Module, record: AdapterRecord
) -> Iterator[str]:
    """What is wrong with a tensor that is no part of the adapter; nothing if the model has it.

    PEFT writes the base weight of an embedding or head that it adapts, and with ``bias="all"`` the
    biases of the originals of ``modules_to_save``, which nothing reads.
    """
    kinds = ("original_module", "modules_to_save")
    unread = tuple(f"{name}.{kind}." for name in record.saved_modules for kind in kinds)
    if key.startswith(unread):
        return
    name = base_name(key, model)
    if name is None:
        yield f"unexpected: {key} {list(value.shape)}"
        return
    found = parameter_of(model, name)
    assert found is not None
    own = found.detach()
    if own.shape != value.shape:
        yield _shapes(key, value, own.shape)
    elif not own.is_meta and not torch.equal(own, value.to(own.device, own.dtype)):
        yield (
            f"other base: {key} has other values than {name}, which is frozen in the model. The "
            "adapter was trained on another model, or with another configuration: give that, or "
            "copy the tensor into the model first"
        )


def _shapes(key: str, stored: torch.Tensor, shape: tuple[int, ...]) -> str:
    return f"shape: {key} is {list(stored.shape)} as it was saved, {list(shape)} in the model"
