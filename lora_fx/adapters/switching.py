"""Switching of adapters: branches are inserted into the base's graphs, and parameters are exchanged.

:func:`lora_fx.set_adapter` and the ``with`` blocks around the running code decide which adapters run.

Any number of threads and asyncio tasks may be inside blocks if the model's graphs serve all of them. The
graphs of a model with per-sample adapters do. Graphs are edited, for a block or permanently, only while no
other thread or task is in a block.
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
    AdapterRecord,
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
from lora_fx.runtime.rows import SampleRows, ignore_ids, unwatch_calls, watch_calls

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
    """Return a capture of a rewritten model with the base's graphs, which have no branches.

    Modules that were removed or replaced since the rewrite are left out.
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
    """Raise if a name belongs to no adapter, or is listed twice.

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
    """Raise if adapters cannot be active together in a model, or in a batch.

    Raises:
        ConfigError: If two adapters replace the same parameter of the base. With ``per_sample``, if an
            adapter replaces a parameter of a layer that one of them adapts.
    """
    if per_sample:
        _check_layers(record, names)
        return
    _check_tokens(record, names)
    owners: dict[str, str] = {}
    for name in names:
        for parameter in record.adapters[name].own:
            if owners.setdefault(parameter, name) != name:
                raise ConfigError(
                    f"{owners[parameter]!r} and {name!r} cannot be active together: each has its own "
                    f"{parameter} (modules_to_save, bias, or an initialization that changed the base)"
                )


def _check_layers(record: Record, names: Sequence[str]) -> None:
    """Raise if an adapter replaces a parameter of a layer that factors adapt, for per-sample adapters.

    The samples of one batch cannot use different values of such a parameter.
    """
    adapted = {row.site.owner for name in names for row in record.adapters[name].sites}
    for name in names:
        adapter = record.adapters[name]
        replaced = (*adapter.own, *(tokens.site.weight for tokens in adapter.tokens))
        for parameter in replaced:
            if parameter.rpartition(".")[0] in adapted:
                raise ConfigError(
                    f"{name!r} has its own {parameter} (modules_to_save, bias, trainable_token_indices, or "
                    "an initialization that changed the base), and factors adapt that layer, so that samples "
                    "of a batch cannot choose its values. Choose one adapter for the whole batch"
                )


def _check_tokens(record: Record, names: Sequence[str]) -> None:
    """Raise if an embedding with trained rows of one adapter is also adapted by another."""
    for name in names:
        for tokens in record.adapters[name].tokens:
            for other in names:
                if other != name and any(
                    adapted.site.weight == tokens.site.weight
                    for adapted in record.adapters[other].places
                ):
                    raise ConfigError(
                        f"{name!r} and {other!r} cannot be active together: {name!r} has rows of its own in "
                        f"{tokens.name} (trainable_token_indices), and {other!r} adapts it"
                    )


def check_regions(capture: Capture, rows: Sequence[PlannedSite | PlannedTokens]) -> None:
    """Raise if a site has no graph any more, so that it cannot get a branch.

    Raises:
        CaptureError: If there is such a site.
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
"""The ``with`` blocks around the running code, of all models, the innermost last."""


def run_with(model: nn.Module, record: Record, *, rebuild: bool = False) -> None:
    """Make a model run with the adapters of a record.

    Args:
        model: A rewritten model.
        record: The new record. Its choice and its blocks say which adapters run; its ``active`` is ignored.
        rebuild: True to rebuild the graphs even if the present ones would do.

    Raises:
        ConfigError, CaptureError: If the model cannot run with these adapters. The model is unchanged then.
    """
    before, wanted = require_record(model), _wanted_of(record)
    edits = rebuild or (wanted.names, wanted.per_sample) != (before.active, before.per_sample)
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
    """Activate a block for the current thread or task.

    Raises:
        ConfigError, CaptureError: If the model cannot run with the adapters of the block. The model is
            unchanged then.
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
    """End a block. It ends even if the earlier adapters cannot be restored.

    Raises:
        CaptureError: If the earlier adapters cannot be restored. The model then keeps its current adapters.
    """
    record = require_record(model)
    _around.set(tuple(other for other in _around.get(()) if other is not block))
    blocks = tuple(other for other in record.blocks if other is not block)
    record = dataclasses.replace(record, chosen=record.choice, blocks=blocks)
    if _others(record):
        # The other blocks use the model's current graphs. The last one to leave restores the choice.
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
    """Return the blocks of a model around the running code, the innermost last."""
    around = {id(block) for block in _around.get(())}
    return [block for block in record.blocks if id(block) in around]


def _others(record: Record) -> list[ActiveAdapters]:
    """Return the blocks of a model around the code of other threads or tasks."""
    own = {id(block) for block in _own(record)}
    return [block for block in record.blocks if id(block) not in own]


def _check_alone(record: Record, edits: bool) -> None:
    """Raise if other threads or tasks are in blocks, and the graphs need edits or were edited for a block.

    Args:
        record: The new record of the model.
        edits: True if the graphs have to be edited.

    Raises:
        ConfigError: If the graphs have to be edited, or were edited for a block of another thread or task.
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
    """Return the adapters to run: none if a block disables adapters, else those of the innermost block.

    If the graphs have a branch for each adapter that a block names, the graphs stay as they are.
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
    """Write the adapter of each sample into the tables that the branches read, or clear these tables."""
    thread = threading.get_ident()
    shared = any(block.thread == thread for block in _others(record))
    for holder in [module for module in model.modules() if isinstance(module, SampleRows)]:
        holder.assign(wanted.ids, wanted.repeats, shared=shared)


def _edit(model: nn.Module, record: Record, wanted: ActiveAdapters) -> None:
    """Insert the branches of the wanted adapters into the graphs, and exchange the parameters.

    If this fails, nothing is changed.
    """
    check_intact(model, require_record(model))
    _check_parametrized(model, record)
    names, per_sample = wanted.names, wanted.per_sample
    if per_sample and record.deploys:
        raise ConfigError(
            "an adapter of the model is trained for a storage of its weights (deploy=), and samples of a "
            "batch cannot have different ones: merge it, or load it without (load_adapter(..., deploy=None))"
        )
    rows = tuple(row for name in names for row in record.adapters[name].sites)
    capture = base_capture(model, record)
    adapters = {name: record.adapters[name] for name in names}
    # Per-sample token rows are added in the weight that a lookup reads, so no graph is edited for them.
    targets: tuple[PlannedSite | PlannedTokens, ...] = rows
    if not per_sample:
        targets = tuple(target for adapter in adapters.values() for target in adapter.places)
    check_regions(capture, targets)
    passes = branch_passes(
        adapters,
        optimize=record.optimize,
        memory=record.memory,
        loss=record.loss,
        per_sample=per_sample,
    )
    with computed_as_parameters(model):
        edited = run_passes(capture, passes)
    regions = tuple(regions_to_install(edited, targets))
    _take_out(model, record)
    running = {region.module for region in regions}
    for module in (child for child in model.modules() if is_region(child) and child not in running):
        uninstall(module)
    install(regions)
    _place_rows(model, adapters if per_sample else {})
    if not per_sample and record.blocks and record.choice.per_sample:
        ignore_ids(model)
    record = dataclasses.replace(record, active=names, per_sample=per_sample)
    _put_in(model, record)
    model.__dict__["_lora_fx"] = record
    arm(model)


def _check_parametrized(model: nn.Module, record: Record) -> None:
    """Raise if a weight was parametrized since the rewrite, because no pass would find it in its graph."""
    for site in (row.site for adapter in record.adapters.values() for row in adapter.sites):
        owner, _, leaf = site.weight.rpartition(".")
        if parametrize.is_parametrized(model.get_submodule(owner), leaf):
            raise CaptureError(
                f"{site.weight} is computed by a parametrization since the rewrite, and adapters cannot be "
                "switched on or off around one: take it off first, with "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {leaf!r})"
            )


def _place_rows(model: nn.Module, adapters: Mapping[str, AdapterRecord]) -> None:
    """Add the shared table of samples to every module that has factors or values of these adapters.

    Args:
        model: The model.
        adapters: The adapters of the samples; empty to remove the table.
    """
    unwatch_calls(model)
    for module in model.modules():
        # The children of a script module cannot be deleted.
        if ROWS in module._modules:
            del module._modules[ROWS]
    if not adapters:
        return
    table = SampleRows(tuple(adapters), next(model.parameters()).device)
    for adapter in adapters.values():
        owners = {name.rpartition(".")[0] for name in adapter.own}
        owners |= {tokens.site.owner for tokens in adapter.tokens}
        owners |= {row.site.holder for row in adapter.sites}
        for owner in owners:
            model.get_submodule(owner).add_module(ROWS, table)
    watch_calls(model, table)


@contextlib.contextmanager
def on_base(model: nn.Module) -> Iterator[Mapping[str, nn.Parameter]]:
    """Restore the base's parameters within the context, and put back the adapters' parameters at the end.

    Yields:
        The base's parameters, by FQN. After an error, parameters that the body replaced are restored.
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
    """Restore the base's parameters in a model, and keep those of its active adapters aside."""
    reshard(model)
    for name in record.placed:
        place_base(model, name, record.adapters[name].own, record.originals)


def _put_in(model: nn.Module, record: Record) -> None:
    """Replace the base's parameters in a model by those of its active adapters."""
    reshard(model)
    for name in record.placed:
        place_own(model, name, record.adapters[name].own)
