"""The tensors of an adapter by PEFT's keys, for whoever keeps checkpoints in a way of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_record, the_adapter
from lora_fx.checkpoint.base_weights import SaveEmbeddings
from lora_fx.checkpoint.checkpoint_state import fill, fitted, stored, without_prefix
from lora_fx.checkpoint.keys import PREFIX
from lora_fx.errors import CheckpointError
from lora_fx.passes.parameters.compiled import inside

__all__ = ["adapter_state_dict", "load_adapter_state_dict"]


@inside
def adapter_state_dict(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors that :func:`lora_fx.save_adapter` writes, by the keys that PEFT has for them.

    Those are the keys of ``peft.get_peft_model_state_dict``: with the prefix ``base_model.model.`` and
    without the adapter's name. Sharded parameters (FSDP2) are gathered: every rank has to call this.

    Args:
        model: A rewritten model.
        adapter_name: Which adapter; by default the only one, or the only active one.
        save_embedding_layers: As for :func:`lora_fx.save_adapter`.

    Returns:
        Tensors on the CPU with storage of their own: training on does not change them.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If the model is on the meta device.
    """
    adapter_name = the_adapter(model, adapter_name)
    found = stored(model, adapter_record(model, adapter_name), adapter_name, save_embedding_layers)
    return {PREFIX + key: value for key, value in found.tensors.items()}


@inside
def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str | None = None
) -> None:
    """Writes the values of a state dict into an adapter that the model has.

    A state dict has no configuration: the scales are taken to be those of the adapter.

    Args:
        model: A rewritten model; its adapter is changed in place, and nothing else is.
        state_dict: As of :func:`adapter_state_dict` or PEFT, with the prefix or without.
        adapter_name: Which adapter; by default the only one, or the only active one.

    Raises:
        ConfigError: If the model has no such adapter, or several could be meant.
        CheckpointError: If a tensor is missing, unexpected or of another shape: all of them are named, and
            nothing was changed.
    """
    adapter_name = the_adapter(model, adapter_name)
    record = adapter_record(model, adapter_name)
    values, problems = fitted(model, record, adapter_name, without_prefix(dict(state_dict)), None)
    if problems:
        what = (
            f"the state dict does not fit adapter {adapter_name!r} of this {type(model).__name__}"
        )
        raise CheckpointError("\n  ".join([f"{what}; nothing was changed:", *sorted(problems)]))
    fill(model, adapter_name, values)
