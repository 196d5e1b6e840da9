"""Puts what was merged or trained into a model of the base class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lora_fx.passes._buffers import changed_buffers
from lora_fx.passes._own import own_value
from lora_fx.record import Record

__all__ = ["place_biases", "place_merged", "place_trained", "trained", "untie_config"]


def place_merged(
    result: nn.Module, merged: dict[str, torch.Tensor], tied: dict[str, str]
) -> tuple[str, ...]:
    """Puts the merged weights in and says which of them were tied to something, and are not now."""
    places = Counter(
        id(parameter)
        for module in result.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    together = Counter(id(result.get_parameter(name)) for name in (*tied, *set(tied.values())))
    untied = tuple(
        name
        for name in merged
        if places[own := id(result.get_parameter(name))] > max(1, together[own])
    )
    for name, weight in merged.items():
        if name not in tied:
            _set_parameter(result, name, weight)
    for name, to in tied.items():
        owner, _, key = name.rpartition(".")
        result.get_submodule(owner)._parameters[key] = result.get_parameter(to)
    return untied


def place_biases(result: nn.Module, biases: dict[str, torch.Tensor]) -> None:
    """Puts the merged biases in; others that they shared a parameter with keep it."""
    for name, bias in biases.items():
        _set_parameter(result, name, bias)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter in the place of one that others may share."""
    owner, _, key = name.rpartition(".")
    old = model.get_parameter(name)
    model.get_submodule(owner)._parameters[key] = nn.Parameter(value, old.requires_grad)


def trained(
    model: nn.Module, record: Record, names: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """What was trained beside the factors, under each of its names."""
    for name in names:
        adapter = record.adapters[name]
        weights = {row.site.weight for row in adapter.sites}
        for own in adapter.own:
            if own not in weights:
                yield own, own_value(model, name, own)


def place_trained(
    model: nn.Module, result: nn.Module, record: Record, names: Sequence[str]
) -> None:
    """Copies what was trained beside the factors: the model may be trained further."""
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in trained(model, record, names):
        if id(parameter) not in copies:
            value = parameter.detach().to(result.get_parameter(name), copy=True)
            _set_parameter(result, name, value)
            copies[id(parameter)] = result.get_parameter(name)
        owner, _, key = name.rpartition(".")
        result.get_submodule(owner)._parameters[key] = copies[id(parameter)]
    buffers = dict(result.named_buffers())
    for name, buffer in changed_buffers(model, record):
        if name in buffers:
            buffers[name].copy_(buffer)


def untie_config(model: nn.Module) -> None:
    """Says in the configuration of a transformers model that its embeddings are not tied any more.

    Otherwise saving and loading ties them again and loses one of the two.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
