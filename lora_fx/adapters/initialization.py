"""Starts that need data: EVA, CorDA, LoRA-GA."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import eva as _eva
from lora_fx.adapters.manage import adapter_record, disable_adapter, the_adapter
from lora_fx.adapters.settings import by_site, with_patterns
from lora_fx.adapters.statistics import Forward, Report, device_of, gradients, moments
from lora_fx.adapters.switching import put_in, take_out
from lora_fx.config import needs_data
from lora_fx.errors import ConfigError
from lora_fx.ir import AdapterRecord, PlannedSite, Record, require_record
from lora_fx.passes.insert import (
    Start,
    computed_starts,
    data_start,
    drop_site,
    initial_start,
    place_slots,
    place_start,
)
from lora_fx.passes.parameters import base_parameters, factors_of, inside, place_base
from lora_fx.passes.plan import at_rank

__all__ = [
    "initialize",
    "restart",
]


def restart(
    model: nn.Module,
    adapter_name: str,
    entry: AdapterRecord,
    rows: Iterable[PlannedSite],
    make: Callable[[PlannedSite, torch.Tensor], Start] | None = None,
) -> None:
    """Computes starts from the base as it was, and puts them in; all of them or none.

    Args:
        model: A rewritten model; changed in place, its graphs are not.
        adapter_name: An adapter of it, active or not.
        entry: What its record becomes, but for the weights that the starts change.
        rows: The sites that start anew.
        make: The start of a site, from its weight; by default what the entry's configuration says.
    """
    record = require_record(model)
    take_out(model, record)
    try:
        starts = computed_starts(
            model, rows, make or (lambda row, weight: initial_start(row, weight, entry.config))
        )
        before = base_parameters(model)
        for row, start in starts:
            place_start(model, row, adapter_name, start)
            place_slots(model, row, adapter_name, entry.config)
        after = base_parameters(model)
        own = [name for name, parameter in after.items() if parameter is not before[name]]
        originals = {**record.originals, **{name: before[name].detach() for name in own}}
        place_base(model, adapter_name, own, originals)
        entry = dataclasses.replace(entry, own=tuple(dict.fromkeys((*entry.own, *own))))
        adapters = {**record.adapters, adapter_name: entry}
        record = dataclasses.replace(record, adapters=adapters, originals=originals)
        model.__dict__["_lora_fx"] = record
    finally:
        put_in(model, record)


@inside
def initialize(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    forward: Forward | None = None,
    progress: bool | Callable[[int, int, str], None] = True,
) -> nn.Module:
    """Gives an adapter the start that its configuration names, for those that need data.

    ``eva`` (arXiv:2410.07170) looks at the inputs of the sites and shares out their ranks, ``corda``
    (arXiv:2406.05223) looks at the inputs' second moments, ``lora_ga`` (arXiv:2407.05000) at the gradients
    of the weights. The last two change the base as the model has it; the model that was rewritten is not
    touched, and a merge and a saved adapter are relative to that.

    Call it before an optimizer is made and before the model is wrapped: factors are new parameters
    afterwards, and with ``eva`` of other shapes. Several processes have to be given the same data.

    Args:
        model: A rewritten model; it is changed.
        dataloader: Batches: a tensor, a tuple or list of the arguments, or a mapping of them by name. They
            are moved to where the model is. ``eva`` may go through them several times, and leaves out
            tokens that an ``attention_mask`` or ``labels`` leave out.
        adapter_name: Which adapter; by default the only one, or the only active one.
        loss_fn: For ``lora_ga``, the loss of the model's output and the batch; by default the output's
            ``loss``, or the output itself.
        forward: How to call the model with a batch, where it is not as above.
        progress: Whether to show a progress bar (if tqdm is installed), or a function that is called with
            (batches done, batches in all or 0, what is being done).

    Returns:
        The model itself.

    Raises:
        ConfigError: If several adapters could be meant, the adapter needs no data, has its start already or
            has been trained, the data is empty, is not what the model takes, does not reach a site, or gives
            values that are not finite, or the model is on the meta device. The model is as it was then.
    """
    adapter_name = the_adapter(model, adapter_name)
    entry = adapter_record(model, adapter_name)
    _check(model, entry, adapter_name, loss_fn)
    with ExitStack() as stack:
        report = stack.enter_context(_reporting(progress, dataloader))
        # What training mode draws is the same each time, and nobody else's numbers are used up.
        device = device_of(model)
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(entry.config.seed)
        stack.enter_context(_same_modes(model))
        stack.enter_context(disable_adapter(model))
        record = require_record(model)
        if entry.config.init_lora_weights == "eva":
            _from_components(model, record, entry, adapter_name, dataloader, forward, report)
        else:
            _from_statistics(
                model, record, entry, adapter_name, dataloader, forward, loss_fn, report
            )
    return model


def _check(model: nn.Module, entry: AdapterRecord, adapter_name: str, loss_fn: object) -> None:
    start = entry.config.init_lora_weights
    if not needs_data(start):
        raise ConfigError(
            f"the adapter {adapter_name!r} has init_lora_weights={start!r}, which needs no data: it has its "
            "start already"
        )
    if entry.initialized:
        raise ConfigError(
            f"the adapter {adapter_name!r} has its start already: for another one rewrite the original "
            "model again, or add an adapter"
        )
    for row in entry.sites:
        a, b = factors_of(model, row, adapter_name).pair
        if not a.is_meta and a.any() and b.any():
            raise ConfigError(
                f"the adapter {adapter_name!r} has been trained ({row.name}), and another start would lose "
                "that: initialize comes before training"
            )
    if loss_fn is not None and start != "lora_ga":
        raise ConfigError(f"init_lora_weights={start!r} needs no gradients: leave out loss_fn")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("the model is on the meta device: give it its weights first")


def _from_components(
    model: nn.Module,
    record: Record,
    entry: AdapterRecord,
    adapter_name: str,
    batches: Iterable[Any],
    forward: Forward | None,
    report: Report,
) -> None:
    found = _eva.components(model, record, entry.sites, entry.config, batches, forward, report)
    rows = tuple(_shared_out(model, entry, found))
    ranks = {row.name: row.rank for row in rows}
    config = with_patterns(entry.config, by_site(rows))

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        report(None, f"starting {row.name}")
        return data_start(row, weight, config, found[row.name].a)

    started = dataclasses.replace(entry, config=config, sites=rows, initialized=True)
    restart(model, adapter_name, started, rows, make)
    for row in entry.sites:
        if row.name not in ranks:
            drop_site(model, row, adapter_name)


def _shared_out(
    model: nn.Module, entry: AdapterRecord, found: Mapping[str, _eva.Found]
) -> Iterator[PlannedSite]:
    """The sites that have a rank, with alphas that keep their scales or not."""
    options: Any = entry.config.eva_config
    for row in entry.sites:
        rank, alpha = found[row.name].rank, row.alpha
        if options["adjust_scaling_factors"]:
            alpha = alpha * rank / row.rank
        if rank:
            yield at_rank(model, row, rank, alpha, entry.config)


def _from_statistics(
    model: nn.Module,
    record: Record,
    entry: AdapterRecord,
    adapter_name: str,
    batches: Iterable[Any],
    forward: Forward | None,
    loss_fn: Callable[[Any, Any], Any] | None,
    report: Report,
) -> None:
    config, rows = entry.config, entry.sites
    by_weight = config.init_lora_weights == "lora_ga"
    if by_weight:
        seen = gradients(model, rows, batches, forward, loss_fn, report)
    else:
        options: Any = config.corda_config
        half = options["use_float16_for_covariance"]
        seen = moments(model, record, rows, batches, forward, report, half=half)

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        report(None, f"starting {row.name}")
        return data_start(row, weight, config, seen[row.site.weight if by_weight else row.name])

    restart(model, adapter_name, dataclasses.replace(entry, initialized=True), rows, make)


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    """Puts back which modules train."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _reporting(
    progress: bool | Callable[[int, int, str], None], dataloader: Iterable[Any]
) -> Iterator[Report]:
    """Whom to tell how far it is."""
    try:
        total = len(dataloader)  # type: ignore[arg-type]  # whoever has no length raises TypeError
    except TypeError:
        total = 0
    if not isinstance(progress, bool):
        yield _telling(progress, total)
    elif not progress or importlib.util.find_spec("tqdm") is None:
        yield lambda done, what: None
    else:
        with importlib.import_module("tqdm").tqdm(total=total or None, unit="batch") as bar:

            def show(done: int, seen: int, what: str) -> None:
                # EVA may go through the batches again.
                bar.total = max(seen, done + 1) if seen else None
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

            yield _telling(show, total)


def _telling(tell: Callable[[int, int, str], None], total: int) -> Report:
    last = 0

    def report(done: int | None, what: str) -> None:
        nonlocal last
        last = last if done is None else done
        tell(last, total, what)

    return report
