"""Several adapters on one model: added, switched, taken away.

Switching edits graphs: the branches of the active adapters are inserted into the graphs that the model had
before any adapter, so that one that is not active costs nothing when the model runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_fx.config import LoraConfig
from lora_fx.errors import CaptureError, ConfigError
from lora_fx.ops import check_adapter_name
from lora_fx.passes._factors import adapter_parameters, drop_factors
from lora_fx.passes._own import (
    base_parameters,
    own_value,
    place_base,
    place_own,
    put_back,
)
from lora_fx.passes._region import install, is_region, uninstall
from lora_fx.passes.capture.written_out import written_out
from lora_fx.passes.plan import make_plan
from lora_fx.passes.select_rows import ROWS, check_rows
from lora_fx.pipeline import added, branch_passes, check_config, run_passes, running
from lora_fx.record import AdapterRecord, Record, require_record
from lora_fx.samples import SampleRows
from lora_fx.types import Capture, PlannedSite, PlannedTokens, Region

__all__ = [
    "active_adapters",
    "adapter_ids",
    "adapter_names",
    "adapter_record",
    "add_adapter",
    "base_capture",
    "delete_adapter",
    "disable_adapter",
    "note_start",
    "put_adapter",
    "put_in",
    "set_adapter",
    "take_out",
]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a rewritten model's adapters, in the order in which they were added.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    return tuple(require_record(model).adapters)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of those that the model runs with.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    return require_record(model).active


def adapter_record(model: nn.Module, adapter_name: str) -> AdapterRecord:
    """What is known of one adapter.

    Raises:
        ConfigError: If the model is not rewritten, or has no such adapter.
    """
    record = require_record(model)
    _check_known(record, [adapter_name])
    return record.adapters[adapter_name]


def add_adapter(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, strict: bool = False
) -> nn.Module:
    """Puts one more adapter on a rewritten model. It is not active until :func:`set_adapter` makes it so.

    Args:
        model: A rewritten model. It is changed.
        config: What to adapt; it need not be what another adapter adapts.
        adapter_name: Its name.
        strict: Whether an entry of the configuration that selects nothing is an error.

    Returns:
        The model itself.

    Raises:
        ConfigError: If the model is not rewritten, the name is taken or cannot be one, or the adapter
            and another one both train biases (``bias``).
        NoMatchError, PartialMatchError: As :func:`lora_fx.rewrite`.
    """
    check_config(config)
    put_adapter(model, config, adapter_name, strict=strict)
    return model


def put_adapter(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, strict: bool = False
) -> AdapterRecord:
    """:func:`add_adapter`, for those who want to know what became of it."""
    check_adapter_name(adapter_name)
    record = require_record(model)
    if adapter_name in record.adapters:
        raise ConfigError(
            f"there is an adapter {adapter_name!r} already: choose another name, or take that one away "
            "with lora_fx.delete_adapter"
        )
    if config.bias != "none":
        for name, other in record.adapters.items():
            if other.config.bias != "none":
                raise ConfigError(
                    f"bias={config.bias!r}: the adapter {name!r} trains biases of the base already, and "
                    "one adapter at most can: give bias='none'"
                )
    capture = base_capture(model, record)
    take_out(model, record)
    before = base_parameters(model)
    try:
        plan = make_plan(capture, record.base.matches, config, strict=strict)
        _check_regions(capture, (*plan.sites, *plan.tokens))
        record = added(capture, record, plan, adapter_name)
        new = record.adapters[adapter_name]
        place_base(model, adapter_name, new.own, record.originals)
    except BaseException:
        drop_factors(model, adapter_name)
        put_back(model, before)
        raise
    finally:
        put_in(model, require_record(model))
    _freeze(model, adapter_name, new)
    model.__dict__["_lora_fx"] = record
    return new


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    *,
    inference_mode: bool = False,
    per_sample: bool = False,
) -> None:
    """Makes adapters active, and all others inactive.

    The branches of several active adapters are added up. The parameters of active adapters want a
    gradient, those of others do not.

    Args:
        model: A rewritten model. Its graphs are edited; a compiled one is compiled anew.
        adapter_name: One name, or several. None of them (an empty list) leaves the base.
        inference_mode: Whether the active ones are frozen, too.
        per_sample: Whether each sample of a batch has one of them (or none) instead of all. Which
            sample has which is said by :func:`adapter_ids`, inside which the model then has to be called.

    Raises:
        ConfigError: If there is no such adapter, a name is there twice, two of them have something in
            the place of the same parameter of the base, or (``per_sample``) one has something in the
            place of any, or a site whose rows are not samples. The model is as it was then.
    """
    record = require_record(model)
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    _check_known(record, names)
    _check_together(record, names, per_sample)
    _activate(model, record, names, per_sample)
    for name, adapter in record.adapters.items():
        if name in names and not inference_mode:
            _unfreeze(model, name, adapter)
        else:
            _freeze(model, name, adapter)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter off a model.

    Args:
        model: A rewritten model.
        adapter_name: An adapter that is not active.

    Raises:
        ConfigError: If there is no such adapter, or it is active.
    """
    record = require_record(model)
    _check_known(record, [adapter_name])
    if adapter_name in record.active:
        raise ConfigError(
            f"the adapter {adapter_name!r} is active: activate another one first, with "
            "lora_fx.set_adapter(model, name), or none, with an empty list"
        )
    drop_factors(model, adapter_name)
    adapters = {name: one for name, one in record.adapters.items() if name != adapter_name}
    model.__dict__["_lora_fx"] = dataclasses.replace(record, adapters=adapters)


def note_start(model: nn.Module, adapter_name: str) -> None:
    """Notes that an adapter has its values, and waits for no data any more."""
    record = require_record(model)
    entry = dataclasses.replace(record.adapters[adapter_name], initialized=True)
    adapters = {**record.adapters, adapter_name: entry}
    model.__dict__["_lora_fx"] = dataclasses.replace(record, adapters=adapters)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, for as long as the context lasts: no branch, and the base's own parameters.

    Adapters keep their values, and want a gradient afterwards if they did before.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    before = require_record(model)
    _activate(model, before, ())
    try:
        yield model
    finally:
        _reactivate(model, before)


@contextmanager
def adapter_ids(model: nn.Module, ids: Sequence[str | None]) -> Iterator[nn.Module]:
    """Gives each sample of a batch its own adapter, for as long as the context lasts.

    Every adapter's branch computes with the rows of its own samples only. If the model is not prepared
    for that with ``set_adapter(model, names, per_sample=True)``, its graphs are edited on the way in and
    out again. Serving loops prepare it once: then only indices change.

    Args:
        model: A rewritten model whose activations have the samples as their first dimension.
        ids: The name of an adapter for each sample; None for the base model.

    Raises:
        ConfigError: If there is no such adapter, one has something in the place of a parameter of the
            base, or a site whose rows are not samples; and when the model is called, if the batch has
            another number of samples.
    """
    if isinstance(ids, str) or not ids:
        raise ConfigError(f"adapter_ids needs one name or None for each sample, found {ids!r}")
    names = tuple(dict.fromkeys(name for name in ids if name is not None))
    before = require_record(model)
    prepared = before.per_sample and set(names) <= set(before.active)
    if not prepared:
        _check_known(before, names)
        _check_together(before, names, per_sample=True)
        _activate(model, before, names, per_sample=True)
    holders = [one for one in model.modules() if isinstance(one, SampleRows)]
    rows = {
        name: torch.tensor([place for place, one in enumerate(ids) if one == name])
        for name in names
    }
    try:
        for holder in holders:
            holder.assign(len(ids), rows)
        yield model
    finally:
        for holder in holders:
            holder.assign(0, {})
        if not prepared:
            _reactivate(model, before)


def base_capture(model: nn.Module, record: Record) -> Capture:
    """A rewritten model as it was captured: its graphs without branches.

    What has been taken off since, or replaced, is left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    regions = {}
    for fqn, graph in record.base.graphs.items():
        module = modules.get(fqn)
        if module is None or not (is_region(module) or (fqn and written_out(module))):
            continue
        regions[fqn] = Region(fqn, module, graph, record.base.fallback[fqn])
    return Capture(model, regions, record.frontend, record.base.notes)


def _check_known(record: Record, names: Collection[str]) -> None:
    for name in names:
        if name not in record.adapters:
            has = ", ".join(map(repr, record.adapters)) or "none"
            raise ConfigError(f"there is no adapter {name!r}: the model has {has}")
    if len(set(names)) != len(names):
        raise ConfigError(f"an adapter is named twice: {', '.join(map(repr, names))}")


def _check_together(record: Record, names: Sequence[str], per_sample: bool) -> None:
    for name in names if per_sample else ():
        check_rows(record.adapters[name].sites)
        for parameter in record.adapters[name].own:
            raise ConfigError(
                f"{name!r} has its own {parameter} (modules_to_save, bias, or an initialisation that "
                "changed the base): a batch has one value of it, so that samples cannot choose"
            )
        for tokens in record.adapters[name].tokens:
            raise ConfigError(
                f"{name!r} trains rows of {tokens.name} (trainable_token_indices), which a batch has one "
                "value of: choose one adapter for the whole batch"
            )
    _check_tokens(record, names)
    owners: dict[str, str] = {}
    for name in names:
        for parameter in record.adapters[name].own:
            if owners.setdefault(parameter, name) != name:
                raise ConfigError(
                    f"{owners[parameter]!r} and {name!r} cannot be active together: each has its own "
                    f"{parameter} (modules_to_save, bias, or an initialisation that changed the base)"
                )


def _check_tokens(record: Record, names: Sequence[str]) -> None:
    """Rows that are replaced are nobody else's."""
    for name in names:
        for tokens in record.adapters[name].tokens:
            for other in names:
                if other != name and any(
                    place.site.weight == tokens.site.weight
                    for place in record.adapters[other].places
                ):
                    raise ConfigError(
                        f"{name!r} and {other!r} cannot be active together: {name!r} has rows of its own in "
                        f"{tokens.name} (trainable_token_indices), and {other!r} adapts it"
                    )


def _check_regions(capture: Capture, rows: Sequence[PlannedSite | PlannedTokens]) -> None:
    for row in rows:
        if not any(call.region in capture.regions for call in row.site.calls):
            region = row.site.calls[0].region or "the model"
            raise CaptureError(
                f"{row.name}: the graph of {region} has been taken off since the rewrite, because an "
                "attribute that it was made for was set, or the module was replaced: rewrite the original "
                "model with that change"
            )


def _activate(
    model: nn.Module, record: Record, names: tuple[str, ...], per_sample: bool = False
) -> None:
    """Edits the graphs and puts in what the adapters have; nothing is changed if that is not possible."""
    rows = tuple(row for name in names for row in record.adapters[name].sites)
    capture = base_capture(model, record)
    adapters = {name: record.adapters[name] for name in names}
    places = tuple(place for one in adapters.values() for place in one.places)
    _check_regions(capture, places)
    passes = branch_passes(adapters, optimize=record.optimize, per_sample=per_sample)
    edited = run_passes(capture, passes)
    regions = tuple(running(edited, places))
    take_out(model, record)
    for fqn in capture.regions.keys() - {region.fqn for region in regions}:
        uninstall(capture.regions[fqn].module)
    install(regions)
    _place_rows(model, rows, names if per_sample else ())
    record = dataclasses.replace(record, active=names, per_sample=per_sample)
    put_in(model, record)
    model.__dict__["_lora_fx"] = record


def _reactivate(model: nn.Module, before: Record) -> None:
    """Activates what was active at some time, but for what has been deleted since."""
    record = require_record(model)
    names = tuple(name for name in before.active if name in record.adapters)
    _activate(model, record, names, before.per_sample)


def _place_rows(model: nn.Module, rows: Sequence[PlannedSite], names: tuple[str, ...]) -> None:
    """Puts the one table of samples beside the factors of every site, or takes it away."""
    for module in model.modules():
        module._modules.pop(ROWS, None)
    if names:
        device = next(model.parameters()).device
        table = SampleRows(names, device)
        for row in rows:
            model.get_submodule(row.site.holder).add_module(ROWS, table)


def take_out(model: nn.Module, record: Record) -> None:
    """Puts the base's own parameters into a model, and beside it what its active adapters have there."""
    for name in record.active:
        place_base(model, name, record.adapters[name].own, record.originals)


def put_in(model: nn.Module, record: Record) -> None:
    """Puts what the active adapters have beside the base into it."""
    for name in record.active:
        place_own(model, name, record.adapters[name].own)


def _freeze(model: nn.Module, name: str, adapter: AdapterRecord) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)
    for own in adapter.own:
        own_value(model, name, own).requires_grad_(False)


def _unfreeze(model: nn.Module, name: str, adapter: AdapterRecord) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(True)
    # A weight that an initialisation has changed is the adapter's own, and frozen.
    weights = {row.site.weight for row in adapter.sites}
    for own in adapter.own:
        value = own_value(model, name, own)
        value.requires_grad_(own not in weights and value.is_floating_point())
