"""What adapters a model has, and how they stand: the question that one asks before training and serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.ir import AdapterRecord, require_record
from lora_fx.passes.parameters import adapter_parameters, inside, own_value, trained_by_hand
from lora_fx.runtime import is_checked

__all__ = ["AdapterStatus", "ModelStatus", "status"]

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model.

    Attributes:
        name: Its name.
        active: Whether the model runs with it.
        trainable: Whether its parameters want a gradient; None if some do and some do not.
        sites: Number of operations that it adapts.
        ranks: The lowest and the highest rank; None without sites.
        parameters: Elements of its factors and of all else that it trains.
        saved_modules: Modules that it trains in full.
        biases: FQNs of the biases that it trains.
        dtypes: Of its parameters.
        devices: Where they are.
    """

    name: str
    active: bool
    trainable: bool | None
    sites: int
    ranks: tuple[int, int] | None
    parameters: int
    saved_modules: tuple[str, ...]
    biases: tuple[str, ...]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]

    def __str__(self) -> str:
        state = "active" if self.active else "not active"
        trained = {True: "trainable", False: "frozen", None: "trainable in part"}[self.trainable]
        ranks = "no site"
        if self.ranks is not None:
            low, high = self.ranks
            ranks = f"{self.sites} site(s) of rank {low if low == high else f'{low} to {high}'}"
        more = [f"trains {name} in full" for name in self.saved_modules]
        more += [f"trains {len(self.biases)} bias(es)"] if self.biases else []
        where = f"{', '.join(self.dtypes)} on {', '.join(self.devices)}" if self.dtypes else ""
        parts = [state, trained, ranks, f"{self.parameters:,} parameters", where, *more]
        return f"{self.name}: {', '.join(part for part in parts if part)}"


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """The adapters of a model, in the order in which they were added.

    Attributes:
        adapters: One for each.
        per_sample: Whether each sample of a batch has one of the active ones.
        by_hand: FQNs of the base's parameters that are trained, or were, though no adapter trains them: they
            are merged and saved with whichever adapter is.
        unchecked: Whether no eager call has shown yet that nothing reads adapted weights past the active
            adapters: nothing has run, or a compiler or an export alone. The next eager call, or
            :func:`lora_fx.check`, shows it.
    """

    adapters: tuple[AdapterStatus, ...]
    per_sample: bool
    by_hand: tuple[str, ...] = ()
    unchecked: bool = False

    def __iter__(self) -> Iterator[AdapterStatus]:
        return iter(self.adapters)

    def __str__(self) -> str:
        lines = [str(adapter) for adapter in self.adapters] or ["no adapter"]
        if self.per_sample:
            lines.append("each sample of a batch has one of the active adapters, or none")
        if self.by_hand:
            shown = ", ".join(self.by_hand[:_SHOWN])
            more = len(self.by_hand) - _SHOWN
            lines.append(
                f"trained by hand, beside the adapters: {shown}"
                + (f" and {more} more" if more > 0 else "")
            )
        if self.unchecked:
            lines.append(
                "unchecked: no eager call of the model with these adapters has been watched yet"
            )
        return "\n".join(lines)


@inside
def status(model: nn.Module) -> ModelStatus:
    """How the adapters of a rewritten model stand; ``str()`` has a line for each.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    record = require_record(model)
    return ModelStatus(
        tuple(
            _status(model, name, adapter, name in record.active)
            for name, adapter in record.adapters.items()
        ),
        record.per_sample,
        tuple(trained_by_hand(model, record)),
        not is_checked(model),
    )


def _status(model: nn.Module, name: str, adapter: AdapterRecord, active: bool) -> AdapterStatus:
    weights = {row.site.weight for row in adapter.sites} | set(adapter.given)
    trained: dict[int, nn.Parameter] = {id(p): p for p in adapter_parameters(model, name)}
    for own in adapter.own:
        if own not in weights:
            value = own_value(model, name, own)
            trained[id(value)] = value
    wanting = {p.requires_grad for p in trained.values() if p.is_floating_point()}
    ranks = [row.rank for row in adapter.sites]
    return AdapterStatus(
        name=name,
        active=active,
        trainable=wanting.pop() if len(wanting) == 1 else None if wanting else False,
        sites=len(ranks),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        parameters=sum(p.numel() for p in trained.values()),
        saved_modules=adapter.saved_modules,
        biases=adapter.biases,
        dtypes=tuple(sorted({_short(p.dtype) for p in trained.values()})),
        devices=tuple(sorted({str(p.device) for p in trained.values()})),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
