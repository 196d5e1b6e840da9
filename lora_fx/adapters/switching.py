"""Which adapters a model runs with: graphs are made from those without branches, parameters change places.

What counts is what :func:`lora_fx.set_adapter` has chosen, and what the ``with`` blocks around it say.

Any number of threads and asyncio tasks may be inside blocks as long as the model's graphs serve all of them:
those of a model that is prepared for an adapter for each sample do. Graphs are edited, for a block or for
good, only while no other thread or task is in a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar

from torch import nn
from torch.nn.utils import parametrize

from lora_fx.errors import CaptureError, ConfigError
from lora_fx.ir import (
    ActiveAdapters,
    Capture,
    PlannedSite,
    PlannedTokens,
    Record,
    require_record,
)
from lora_fx.passes.effective import arm
from lora_fx.passes.graph import class_name, install, is_region, uninstall
from lora_fx.passes.insert import ROWS
from lora_fx.passes.parameters import (
    base_parameters,
    check_intact,
    computed_as_parameters,
    place_base,
    place_own,
    put_back,
    reshard,
)
from lora_fx.passes.pipeline import branch_passes, regions_to_install, run_passes
from lora_fx.runtime import SampleRows, ignore_ids, unwatch_calls, watch_calls

__all__ = [
    "base_capture",
    "check_known",
    "check_regions",
    "check_together",
    "enter",
    "leave",
    "on_base",
    "run_with",
]


def base_capture(model: nn.Module, record: Record) -> Capture:
    """A rewritten model as it was captured: its graphs without branches.

    What has been taken off since, or replaced, is left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    regions = {}
    for fqn, name in record.base.classes.items():
        module = modules.get(fqn)
        if module is not None and class_name(module) == name:
            regions[fqn] = record.base.region(fqn, module, record.frontend)
    base = record.base
    return Capture(model, regions, record.frontend, base.notes, matches=base.matches)


def check_known(record: Record, names: Collection[str]) -> None:
    """Refuses names that no adapter has, and one that is there twice.

    Raises:
        ConfigError: If there is such a name.
    """
    for name in names:
        if name not in record.adapters:
            has = ", ".join(map(repr, record.adapters)) or "none"
            raise ConfigError(f"there is no adapter {name!r}: the model has {has}")
    if len(set(names)) != len(names):
        raise ConfigError(f"an adapter is named twice: {', '.join(map(repr, names))}")


def check_together(record: Record, names: Sequence[str], per_sample: bool) -> None:
    """Refuses adapters of which a model has one at a time, or a batch.

    Raises:
        ConfigError: If two have something in the same place of the base, or (``per_sample``) one has any.
    """
    for name in names if per_sample else ():
        for parameter in record.adapters[name].own:
            raise ConfigError(
                f"{name!r} has its own {parameter} (modules_to_save, bias, or an initialization that "
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
                    f"{parameter} (modules_to_save, bias, or an initialization that changed the base)"
                )


def _check_tokens(record: Record, names: Sequence[str]) -> None:
    """Rows that are replaced are shared with nothing."""
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


_around: ContextVar[tuple[ActiveAdapters, ...]] = ContextVar("lora_fx_blocks")
"""The ``with`` blocks that the running code is in, of all models, the innermost last."""


def run_with(model: nn.Module, record: Record, *, anew: bool = False) -> None:
    """Lets a model run with what a record says.

    Args:
        model: A rewritten model.
        record: What it is to become. Its choice and its blocks count, not what it says to be active.
        anew: Whether to make graphs again where the present ones would do.

    Raises:
        ConfigError, CaptureError: If that cannot be. The model is as it was then.
    """
    before, wanted = require_record(model), _wanted_of(record)
    edits = anew or (wanted.names, wanted.per_sample) != (before.active, before.per_sample)
    _check_alone(record, edits)
    record = dataclasses.replace(
        record,
        active=before.active,
        per_sample=before.per_sample,
        chosen=record.choice if record.blocks else None,
    )
    if edits:
        _edit(model, record, wanted)
    else:
        model.__dict__["_lora_fx"] = record
    _assign(model, record, wanted)


def enter(model: nn.Module, block: ActiveAdapters) -> None:
    """Lets a block count for the thread or task that runs this.

    Raises:
        ConfigError, CaptureError: If that cannot be. The model is as it was then.
    """
    record = require_record(model)
    token = _around.set((*_around.get(()), block))
    blocks = (*record.blocks, block)
    try:
        run_with(model, dataclasses.replace(record, chosen=record.choice, blocks=blocks))
    except BaseException:
        _around.reset(token)
        raise


def leave(model: nn.Module, block: ActiveAdapters) -> None:
    """Lets a block count no longer, also where what counted before cannot be had any more.

    Raises:
        CaptureError: In that case. The model then goes on with what it has.
    """
    record = require_record(model)
    _around.set(tuple(other for other in _around.get(()) if other is not block))
    blocks = tuple(other for other in record.blocks if other is not block)
    record = dataclasses.replace(record, chosen=record.choice, blocks=blocks)
    if _others(record):
        # They run what the model runs. The last one to leave brings the choice back.
        model.__dict__["_lora_fx"] = record
        _assign(model, record, _wanted_of(record))
        return
    try:
        run_with(model, record)
    except BaseException:
        chosen = record.chosen if blocks else None
        model.__dict__["_lora_fx"] = dataclasses.replace(record, chosen=chosen)
        raise


def _own(record: Record) -> list[ActiveAdapters]:
    """The blocks of a model that the running code is in, the innermost last."""
    around = {id(block) for block in _around.get(())}
    return [block for block in record.blocks if id(block) in around]


def _others(record: Record) -> list[ActiveAdapters]:
    """The blocks of a model that other threads or tasks are in."""
    own = {id(block) for block in _own(record)}
    return [block for block in record.blocks if id(block) not in own]


def _check_alone(record: Record, edits: bool) -> None:
    """Refuses graphs other than those that were chosen while several threads or tasks are in blocks.

    Args:
        record: What the model is to become.
        edits: Whether its graphs are to be edited.

    Raises:
        ConfigError: If graphs are to be edited, or were for a block of another thread or task.
    """
    if not _others(record):
        return
    choice = record.choice
    if edits or (record.active, record.per_sample) != (choice.names, choice.per_sample):
        raise ConfigError(
            "another thread or task is inside `with lora_fx.adapter_ids(...)` or `disable_adapter(...)` of "
            "this model, and its graphs serve one of both only: prepare it for all of them once, with "
            "lora_fx.set_adapter(model, [names], per_sample=True), and name None for a sample of the base; "
            "or enter such blocks one after the other"
        )


def _wanted_of(record: Record) -> ActiveAdapters:
    """What a model is to run with: the base if some block disables adapters, else what the innermost says.

    Graphs that have a branch for each adapter that samples name serve them as they are.
    """
    blocks = _own(record)
    if any(not block.ids for block in blocks):
        return ActiveAdapters()
    wanted = record.choice
    for block in blocks:
        served = wanted.per_sample and set(block.names) <= set(wanted.names)
        wanted = dataclasses.replace(block, names=wanted.names if served else block.names)
    return wanted


def _assign(model: nn.Module, record: Record, wanted: ActiveAdapters) -> None:
    """Says which sample of a batch has which adapter, or that none was given."""
    thread = threading.get_ident()
    shared = any(block.thread == thread for block in _others(record))
    for holder in [one for one in model.modules() if isinstance(one, SampleRows)]:
        holder.assign(wanted.ids, wanted.repeats, shared=shared)


def _edit(model: nn.Module, record: Record, wanted: ActiveAdapters) -> None:
    """Edits the graphs and puts in what the adapters have; nothing is changed if that is not possible."""
    check_intact(model, require_record(model))
    _check_parametrized(model, record)
    names, per_sample = wanted.names, wanted.per_sample
    rows = tuple(row for name in names for row in record.adapters[name].sites)
    capture = base_capture(model, record)
    adapters = {name: record.adapters[name] for name in names}
    places = tuple(place for one in adapters.values() for place in one.places)
    check_regions(capture, places)
    passes = branch_passes(
        adapters,
        optimize=record.optimize,
        memory=record.memory,
        loss=record.loss,
        per_sample=per_sample,
    )
    with computed_as_parameters(model):
        edited = run_passes(capture, passes)
    regions = tuple(regions_to_install(edited, places))
    _take_out(model, record)
    running = {region.module for region in regions}
    for module in (one for one in model.modules() if is_region(one) and one not in running):
        uninstall(module)
    install(regions)
    _place_rows(model, rows, names if per_sample else ())
    if not per_sample and record.blocks and record.choice.per_sample:
        ignore_ids(model)
    record = dataclasses.replace(record, active=names, per_sample=per_sample)
    _put_in(model, record)
    model.__dict__["_lora_fx"] = record
    arm(model)


def _check_parametrized(model: nn.Module, record: Record) -> None:
    """Refuses weights that are parametrized since the rewrite: no pass would find them in their graphs."""
    for site in (row.site for one in record.adapters.values() for row in one.sites):
        owner, _, leaf = site.weight.rpartition(".")
        if parametrize.is_parametrized(model.get_submodule(owner), leaf):
            raise CaptureError(
                f"{site.weight} is computed by a parametrization since the rewrite, and adapters cannot be "
                "switched on or off around one: take it off first, with "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {leaf!r})"
            )


def _place_rows(model: nn.Module, rows: Sequence[PlannedSite], names: tuple[str, ...]) -> None:
    """Puts the one table of samples beside the factors of every site, or takes it away."""
    unwatch_calls(model)
    for module in model.modules():
        # A script module has its children in something that gives none of them up.
        if ROWS in module._modules:
            del module._modules[ROWS]
    if names:
        device = next(model.parameters()).device
        table = SampleRows(names, device)
        for row in rows:
            model.get_submodule(row.site.holder).add_module(ROWS, table)
        watch_calls(model, table)


@contextlib.contextmanager
def on_base(model: nn.Module) -> Iterator[Mapping[str, nn.Parameter]]:
    """Has the base's own parameters in a rewritten model for a while, then what its adapters have again.

    Yields:
        Those parameters, by FQN: they are put back also where others were put in and an error came.
    """
    _take_out(model, require_record(model))
    before = base_parameters(model)
    try:
        yield before
    except BaseException:
        put_back(model, before)
        raise
    finally:
        _put_in(model, require_record(model))


def _take_out(model: nn.Module, record: Record) -> None:
    """Puts the base's own parameters into a model, and beside it what its active adapters have there."""
    reshard(model)
    for name in record.active:
        place_base(model, name, record.adapters[name].own, record.originals)


def _put_in(model: nn.Module, record: Record) -> None:
    """Puts what the active adapters have beside the base into it."""
    reshard(model)
    for name in record.active:
        place_own(model, name, record.adapters[name].own)
