"""Calls a model with what a dataloader yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, LoraFxError

__all__ = ["Forward", "called", "counted", "loss_of", "on_device", "tokens_seen"]

Forward = Callable[[nn.Module, Any], Any]
"""How to call a model with a batch."""


def counted(dataloader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches of one pass, with their numbers.

    Raises:
        ConfigError: If there are none.
    """
    number = -1
    for number, batch in enumerate(dataloader):
        yield number, batch
    if number < 0:
        raise ConfigError("the dataloader is empty: give at least one batch")


def called(model: nn.Module, batch: Any, number: int, forward: Forward | None) -> Any:
    """The model's output for a batch.

    A tensor is the model's one argument, a tuple or list has all of them, and a mapping has them by name.

    Raises:
        ConfigError: If the model does not take it.
    """
    try:
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, Mapping) or hasattr(batch, "keys"):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        return model(batch)
    except LoraFxError:
        raise
    except Exception as error:
        raise ConfigError(
            f"batch {number}, a {type(batch).__name__}: the model does not take it "
            f"({type(error).__name__}: {error}); give forward=, a function of the model and a batch"
        ) from error


def loss_of(output: Any, batch: Any, loss_fn: Callable[[Any, Any], Any] | None) -> torch.Tensor:
    """The loss of an output.

    Raises:
        ConfigError: If there is none, or it has no gradient.
    """
    loss = output if loss_fn is None else loss_fn(output, batch)
    if loss_fn is None and not isinstance(output, torch.Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"the model's output, a {type(output).__name__}, has no loss: give labels in the batches, or "
            "loss_fn=, a function of the output and the batch that returns a scalar"
        )
    if not torch.isfinite(loss).all():
        raise ConfigError(f"the loss of a batch is {float(loss)}")
    return loss


def on_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(one, device) for key, one in value.items()}
    if isinstance(value, tuple | list):
        parts = [on_device(one, device) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tokens_seen(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Which tokens of a batch count: those that the attention mask has, and that are labelled.

    Args:
        batch: A batch; only a mapping of a language model's inputs says something of tokens.
        ignored_label: The label of those that are not; None if labels do not matter.

    Returns:
        A mask of all tokens, flat; None if every vector counts.
    """
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        return None
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    if mask.shape != ids.shape:
        return None
    mask = mask.bool()
    if ignored_label is not None and "labels" in batch and batch["labels"].shape == ids.shape:
        mask = mask & (batch["labels"] != ignored_label)
    return torch.flatten(mask)
