"""Which adapters a model runs with: branches in its graphs, and what each has in the place of the base's.

Branches of the active adapters are inserted into the graphs that the model had before any adapter; what they
have in the place of the base's parameters is put in, and beside them for all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from lora_fx.errors import CaptureError, ConfigError
from lora_fx.passes._own import place_base, place_own
from lora_fx.passes._region import install, is_region, uninstall
from lora_fx.passes.capture.written_out import written_out
from lora_fx.passes.select_rows import ROWS, check_rows
from lora_fx.pipeline import branch_passes, run_passes, running
from lora_fx.record import Record, require_record
from lora_fx.samples import SampleRows
from lora_fx.types import Capture, PlannedSite, PlannedTokens, Region

__all__ = [
    "activate",
    "base_capture",
    "check_regions",
    "check_together",
    "put_in",
    "reactivate",
    "take_out",
]


def activate(
    model: nn.Module, record: Record, names: tuple[str, ...], per_sample: bool = False
) -> None:
    """Edits the graphs and puts in what the adapters have; nothing is changed if that is not possible."""
    rows = tuple(row for name in names for row in record.adapters[name].sites)
    capture = base_capture(model, record)
    adapters = {name: record.adapters[name] for name in names}
    places = tuple(place for one in adapters.values() for place in one.places)
    check_regions(capture, places)
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


def reactivate(model: nn.Module, before: Record) -> None:
    """Activates what was active at some time, but for what has been deleted since."""
    record = require_record(model)
    names = tuple(name for name in before.active if name in record.adapters)
    activate(model, record, names, before.per_sample)


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


def take_out(model: nn.Module, record: Record) -> None:
    """Puts the base's own parameters into a model, and beside it what its active adapters have there."""
    for name in record.active:
        place_base(model, name, record.adapters[name].own, record.originals)


def put_in(model: nn.Module, record: Record) -> None:
    """Puts what the active adapters have beside the base into it."""
    for name in record.active:
        place_own(model, name, record.adapters[name].own)


def check_regions(capture: Capture, rows: Sequence[PlannedSite | PlannedTokens]) -> None:
    """Refuses places of which no graph is left: a branch could be put nowhere.

    Raises:
        CaptureError: If there is one.
    """
    for row in rows:
        if not any(call.region in capture.regions for call in row.site.calls):
            region = row.site.calls[0].region or "the model"
            raise CaptureError(
                f"{row.name}: the graph of {region} has been taken off since the rewrite, because an "
                "attribute that it was made for was set, or the module was replaced: rewrite the original "
                "model with that change"
            )


def check_together(record: Record, names: Sequence[str], per_sample: bool) -> None:
    """Refuses adapters of which a model has one at a time, or a batch.

    Raises:
        ConfigError: If two have something in the same place of the base, or (``per_sample``) one has any.
    """
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


def _place_rows(model: nn.Module, rows: Sequence[PlannedSite], names: tuple[str, ...]) -> None:
    """Puts the one table of samples beside the factors of every site, or takes it away."""
    for module in model.modules():
        module._modules.pop(ROWS, None)
    if names:
        device = next(model.parameters()).device
        table = SampleRows(names, device)
        for row in rows:
            model.get_submodule(row.site.holder).add_module(ROWS, table)
