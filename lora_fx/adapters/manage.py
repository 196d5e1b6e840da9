"""Management of a model's adapters: add, switch, delete, and copy the model as a reference.

Switching edits graphs: the branches of the active adapters are inserted into the base's graphs. An inactive
adapter therefore costs nothing when the model runs.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from lora_fx.adapters.switching import (
    base_capture,
    check_known,
    check_regions,
    check_together,
    enter,
    leave,
    on_base,
    run_with,
)
from lora_fx.config import LoraConfig
from lora_fx.errors import CaptureError, ConfigError, some
from lora_fx.ir import (
    ActiveAdapters,
    AdapterRecord,
    ModelT,
    html_lines,
    html_table,
    is_base,
    require_record,
)
from lora_fx.kinds import base_change, kind_of
from lora_fx.passes.effective import arm
from lora_fx.passes.graph import is_partitioned, own_partition
from lora_fx.passes.insert import with_seed
from lora_fx.passes.parameters import (
    adapter_parameters,
    check_alike,
    check_can_add,
    check_sharded_alike,
    drop_factors,
    frozen_parameters,
    in_adapter,
    inside,
    own_value,
    place_base,
    protect,
    trained_by_hand,
    without_wrappers,
)
from lora_fx.passes.pipeline import (
    add_adapter_parameters,
    check_config,
    check_trains,
    run_passes,
    warn_of_idle_entries,
)
from lora_fx.passes.plan import MakePlan
from lora_fx.passes.trainers import copy_without_trainers
from lora_fx.runtime import is_checked, places_of
from lora_fx.runtime.modules import check_adapter_name

__all__ = [
    "AdapterStatus",
    "ModelStatus",
    "active_adapters",
    "adapter_ids",
    "adapter_names",
    "adapter_record",
    "add_adapter",
    "delete_adapter",
    "disable_adapter",
    "note_start",
    "put_adapter",
    "reference",
    "set_adapter",
    "status",
    "the_adapter",
]


@inside
def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a rewritten model's adapters, in the order in which they were added.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    return tuple(require_record(model).adapters)


@inside
def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that the model runs with.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    return require_record(model).active


def adapter_record(model: nn.Module, adapter_name: str) -> AdapterRecord:
    """Return the record of an adapter.

    Raises:
        ConfigError: If the model is not rewritten, or has no such adapter.
    """
    record = require_record(model)
    check_known(record, [adapter_name])
    return record.adapters[adapter_name]


def the_adapter(model: nn.Module, adapter_name: str | None) -> str:
    """Return the adapter to use: the named one, else the only one, or the only active one.

    Raises:
        ConfigError: If the model is not rewritten, has no such adapter, or several could be meant.
    """
    record = require_record(model)
    if adapter_name is not None:
        check_known(record, [adapter_name])
        return adapter_name
    for names in (tuple(record.adapters), record.choice.names):
        if len(names) == 1:
            return names[0]
    has = ", ".join(map(repr, record.adapters)) or "none"
    active = ", ".join(map(repr, record.choice.names)) or "none"
    raise ConfigError(
        f"adapter_name: say which adapter is meant: the model has {has}; active: {active}"
    )


@inside
def add_adapter(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, strict: bool = False
) -> nn.Module:
    """Add an adapter to a rewritten model. It is inactive until :func:`set_adapter` activates it.

    Args:
        model: A rewritten model, changed in place.
        config: The configuration of the adapter. It may target other operations than the existing adapters.
        adapter_name: The name of the new adapter.
        strict: True to raise if an entry of the configuration selects nothing.

    Returns:
        The model itself.

    Raises:
        ConfigError: If the model is not rewritten, the name is taken or not valid, or the adapter and another
            one both train biases (``bias``).
        NoMatchError, PartialMatchError: As :func:`lora_fx.rewrite`.
    """
    check_config(config)
    put_adapter(model, with_seed(config), adapter_name, strict=strict)
    return model


def put_adapter(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, strict: bool = False
) -> AdapterRecord:
    """Add an adapter like :func:`add_adapter`, and return its record."""
    check_adapter_name(adapter_name)
    record = require_record(model)
    if adapter_name in record.adapters:
        raise ConfigError(
            f"there is an adapter {adapter_name!r} already: choose another name, or take that one away "
            "with lora_fx.delete_adapter"
        )
    if record.deploys:
        raise ConfigError(
            "the model has an adapter that is trained for a storage of its weights (deploy=), and "
            f"{adapter_name!r} would be a second one: rewrite the base once more for it, or load the first "
            "without (load_adapter(..., deploy=None))"
        )
    if config.bias != "none":
        for name, other in record.adapters.items():
            if other.config.bias != "none":
                raise ConfigError(
                    f"bias={config.bias!r}: the adapter {name!r} trains biases of the base already, and "
                    "one adapter at most can: give bias='none'"
                )
    check_can_add(model, adapter_name, beside_weights=_trains_beside_weights(config))
    capture = base_capture(model, record)
    with on_base(model):
        try:
            capture = dataclasses.replace(capture, matches=record.base.matches)
            capture = run_passes(capture, [MakePlan(config, strict)])
            plan = capture.plan
            assert plan is not None
            check_trains(plan)
            warn_of_idle_entries(plan)
            check_sharded_alike(model, plan.sites)
            check_regions(capture, (*plan.sites, *plan.tokens))
            record = add_adapter_parameters(capture, record, adapter_name)
            new = record.adapters[adapter_name]
            check_alike(model, new.sites, adapter_name)
            place_base(model, adapter_name, new.own, record.originals)
        except BaseException:
            drop_factors(model, adapter_name)
            raise
    _freeze(model, adapter_name, new)
    model.__dict__["_lora_fx"] = record
    return new


def _trains_beside_weights(config: LoraConfig) -> bool:
    """Return True if an adapter trains only factors and vectors, and replaces no parameter of the base."""
    more = (
        config.modules_to_save,
        config.trainable_token_indices,
        config.bias != "none",
    )
    return not any(more) and not base_change(config)


@inside
def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    *,
    inference_mode: bool = False,
    per_sample: bool = False,
) -> None:
    """Activate adapters, and deactivate all others.

    The branches of several active adapters are summed. The parameters of active adapters require a gradient,
    those of inactive adapters do not. Inside :func:`disable_adapter` or :func:`adapter_ids` the parameters
    change immediately, and the model runs with the new adapters when the block ends.

    Args:
        model: A rewritten model. Its graphs are edited; a compiled model is compiled again.
        adapter_name: A name or a list of names. An empty list leaves only the base.
        inference_mode: True to freeze the active adapters as well.
        per_sample: True if each sample of a batch uses one of the adapters (or none) instead of all. Choose
            the adapter of each sample with :func:`adapter_ids`, and call the model inside it.

    Raises:
        ConfigError: If there is no such adapter, a name is repeated, or two adapters replace the same
            parameter of the base. With ``per_sample``, if an adapter replaces a parameter of a layer that has
            factors, or has a site whose rows are not samples. The model is unchanged then.
    """
    record = require_record(model)
    if adapter_name is None:
        raise ConfigError(
            "adapter_name is None: give a name, a list of names, or [] for the model without an adapter"
        )
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    check_known(record, names)
    check_together(record, names, per_sample)
    run_with(
        model, dataclasses.replace(record, chosen=ActiveAdapters(names, per_sample)), rebuild=True
    )
    for name, adapter in record.adapters.items():
        if name in names and not inference_mode:
            _unfreeze(model, name, adapter)
        else:
            _freeze(model, name, adapter)


@inside
def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter from a model.

    Args:
        model: A rewritten model.
        adapter_name: An adapter that is not active.

    Raises:
        ConfigError: If there is no such adapter, or it is active.
    """
    record = require_record(model)
    check_known(record, [adapter_name])
    if any(adapter_name in block.names for block in record.blocks):
        raise ConfigError(
            f"the adapter {adapter_name!r} is one of those that samples have in a "
            "`with lora_fx.adapter_ids(...)` block: leave that first"
        )
    if adapter_name in record.active:
        raise ConfigError(
            f"the adapter {adapter_name!r} is active: activate another one first, with "
            "lora_fx.set_adapter(model, name), or none, with an empty list"
        )
    for other, entry in record.adapters.items():
        if any(adapter_name in kind_of(row).reads for row in entry.sites):
            raise ConfigError(
                f"the adapter {other!r} reads {adapter_name!r}: delete that one first"
            )
    drop_factors(model, adapter_name)
    chosen = record.chosen
    if chosen is not None:
        names = tuple(name for name in chosen.names if name != adapter_name)
        chosen = dataclasses.replace(chosen, names=names)
    adapters = {name: entry for name, entry in record.adapters.items() if name != adapter_name}
    model.__dict__["_lora_fx"] = dataclasses.replace(record, adapters=adapters, chosen=chosen)


def note_start(model: nn.Module, adapter_name: str) -> None:
    """Record that an adapter has its starting values, so that it no longer waits for data."""
    record = require_record(model)
    entry = dataclasses.replace(record.adapters[adapter_name], initialized=True)
    model.__dict__["_lora_fx"] = record.with_adapter(adapter_name, entry)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model within the context: no branches, and the base's own parameters.

    Adapters keep their values, and require a gradient afterwards if they did before. Contexts nest. Inside
    this context the model is the base even if :func:`adapter_ids` names adapters, and a call of
    :func:`set_adapter` takes effect afterwards.

    The model itself changes, for all threads. To run the base in a single thread, prepare the model with
    ``set_adapter(model, names, per_sample=True)`` and name None for the samples.

    Raises:
        ConfigError: If the model is not rewritten, or another thread or task is in a block of this model.
    """
    with _inside_block(model, ActiveAdapters()):
        yield model


@contextmanager
def adapter_ids(
    model: nn.Module, ids: Sequence[str | None], *, repeats: int = 1
) -> Iterator[nn.Module]:
    """Choose the adapter of each sample in a batch within the context.

    Every adapter's branch computes only the rows of its samples. If the model was not prepared with
    ``set_adapter(model, names, per_sample=True)``, its graphs are edited on entry and on exit. Serving loops
    prepare it once, and then only indices change. Contexts nest: the innermost decides, unless
    :func:`disable_adapter` is around it. A call of :func:`set_adapter` takes effect afterwards.

    The block applies to the current thread or asyncio task. Any number of them can be in blocks of a prepared
    model at the same time.

    Args:
        model: A rewritten model. The first dimension of its arguments is the samples, and its activations
            have the samples there in the same order. To check this, the first call with each structure of
            arguments and each range of sizes is traced. Later calls cost nothing.
        ids: The name of an adapter for each sample; None, or PEFT's ``"__base__"``, for the base model.
        repeats: Number of times that ``generate`` of transformers repeats each sample: its ``num_beams`` or
            ``num_return_sequences``, whichever is larger. Batches with the samples repeated this often are
            accepted as well.

    Raises:
        ConfigError: If there is no such adapter, or an adapter replaces a parameter of the base or has a site
            whose rows are not samples. If the graphs have to be edited while another thread or task is in a
            block of this model. When the model is called: if the batch has a different number of samples, or
            samples are mixed. Also if the rows of a site cannot be assigned to samples (positions, sequence
            first, a batch that is doubled inside). Also if a call with a new structure of arguments cannot be
            traced, because a compiler is running: call the model itself once before.
    """
    if isinstance(ids, str) or not ids:
        raise ConfigError(f"adapter_ids needs one name or None for each sample, found {ids!r}")
    if type(repeats) is not int or repeats < 1:
        raise ConfigError(f"repeats: found {repeats!r}; a whole number of at least 1 is needed")
    ids = [None if is_base(name) else name for name in ids]
    names = tuple(dict.fromkeys(name for name in ids if name is not None))
    with without_wrappers(model) as inner:
        record = require_record(inner)
        check_known(record, names)
        check_together(record, names, per_sample=True)
    with _inside_block(model, ActiveAdapters(names, True, tuple(ids), repeats)):
        yield model


@contextmanager
def _inside_block(model: nn.Module, block: ActiveAdapters) -> Iterator[None]:
    """Run a model with the adapters of a ``with`` block in this context. Blocks may end in any order."""
    block = dataclasses.replace(block, thread=threading.get_ident())
    with without_wrappers(model) as inner:
        enter(inner, block)
    try:
        yield
    finally:
        with without_wrappers(model, leaving=True) as inner:
            leave(inner, block)


def _freeze(model: nn.Module, name: str, adapter: AdapterRecord) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)
    for own in adapter.own:
        value = own_value(model, name, own)
        if isinstance(value, nn.Parameter):
            value.requires_grad_(False)


def _unfreeze(model: nn.Module, name: str, adapter: AdapterRecord) -> None:
    frozen = frozen_parameters(model, name, adapter.sites)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(id(parameter) not in frozen)
    # Weights that an initialization changed, or that came with a folder, stay frozen.
    weights = {row.site.weight for row in adapter.sites} | set(adapter.given)
    for own in adapter.own:
        value = own_value(model, name, own)
        if isinstance(value, nn.Parameter):
            value.requires_grad_(own not in weights and value.is_floating_point())


@inside
def reference(model: ModelT) -> ModelT:
    """Return a frozen copy of a rewritten model in eval mode, as a reference for comparisons.

    The copy runs with the active adapters and has its own copy of their values, so further training of
    ``model`` does not change it. Untrained weights are shared, so the copy takes only as much memory as the
    adapters. For a reference without adapters, use the model that was passed to :func:`lora_fx.rewrite`,
    which takes no memory.

    Args:
        model: A rewritten model; it is not changed.

    Returns:
        A rewritten model of the same class, in which no parameter requires a gradient. Attributes that
        trainers have set on ``model`` are left out.

    Raises:
        ConfigError: If the model is not rewritten.
        CaptureError: If it is sharded, or an adapted layer was deleted or replaced.
    """
    record = require_record(model)
    by_hand = trained_by_hand(model, record)
    own = {name for adapter in record.adapters.values() for name in adapter.own}
    trained = own | by_hand.keys()
    result = copy_without_trainers(model, record.forwards, CaptureError)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in trained or in_adapter(result, name):
                if is_partitioned(parameter):
                    own_partition(parameter)
                else:
                    parameter.data = parameter.detach().clone()
            parameter.requires_grad_(False)
    protect(result)
    arm(result)
    return cast("ModelT", result.eval())


_TRAINED = {True: "trainable", False: "frozen", None: "trainable in part"}


@dataclasses.dataclass(frozen=True)
class AdapterStatus:
    """The state of an adapter.

    Attributes:
        name: Its name.
        active: True if the model runs with it.
        trainable: True if its parameters require a gradient; None if only some do.
        sites: Number of operations that it adapts.
        ranks: The lowest and the highest rank; None without sites.
        parameters: Number of elements of its factors and of everything else that it trains.
        saved_modules: Modules that it trains in full.
        biases: FQNs of the biases that it trains.
        dtypes: The dtypes of its parameters.
        devices: The devices of its parameters.
        waits: True if its start waits for data: call :func:`lora_fx.initialize`.
        tokens: Embeddings and heads of which it trains rows (``trainable_token_indices``), each with the
            number of rows.
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
    waits: bool = False
    tokens: tuple[tuple[str, int], ...] = ()

    @property
    def rank_text(self) -> str:
        """The rank, or the lowest and the highest; empty without sites."""
        if self.ranks is None:
            return ""
        low, high = self.ranks
        return str(low) if low == high else f"{low} to {high}"

    def __str__(self) -> str:
        state = "active" if self.active else "not active"
        trained = _TRAINED[self.trainable]
        ranks = f"{self.sites} site(s) of rank {self.rank_text}" if self.ranks else "no site"
        more = ["waits for data (lora_fx.initialize)"] if self.waits else []
        more += [f"trains {count} token(s) of {name}" for name, count in self.tokens]
        more += [f"trains {name} in full" for name in self.saved_modules]
        more += [f"trains {len(self.biases)} bias(es)"] if self.biases else []
        where = f"{', '.join(self.dtypes)} on {', '.join(self.devices)}" if self.dtypes else ""
        parts = [state, trained, ranks, f"{self.parameters:,} parameters", where, *more]
        return f"{self.name}: {', '.join(part for part in parts if part)}"


@dataclasses.dataclass(frozen=True, repr=False)
class ModelStatus:
    """The adapters of a model, in the order in which they were added.

    Attributes:
        adapters: The status of each adapter.
        per_sample: True if each sample of a batch has one of the active adapters.
        by_hand: FQNs of the base's parameters that were unfrozen by hand: they are or were trained, although
            no adapter trains them. They are merged and saved with any adapter.
        unchecked: True if no eager call has shown yet that all reads of adapted weights go through the active
            adapters. The model has not run, or only under a compiler or an export. The next eager call, or
            :func:`lora_fx.check`, checks this.
        computed: Weights that code reads outside of a product, each with the line of the code. The weight
            plus the change of its adapters is then computed as a whole, which is correct but slower.
    """

    adapters: tuple[AdapterStatus, ...]
    per_sample: bool
    by_hand: tuple[str, ...] = ()
    unchecked: bool = False
    computed: tuple[tuple[str, str], ...] = ()

    def __iter__(self) -> Iterator[AdapterStatus]:
        return iter(self.adapters)

    def __repr__(self) -> str:
        named = [
            f"{adapter.name} ({'active' if adapter.active else 'not active'})" for adapter in self
        ]
        return f"<ModelStatus: {', '.join(named) or 'no adapter'}; print it for more>"

    def _repr_html_(self) -> str:
        columns = (
            "adapter",
            "",
            "trained",
            "sites",
            "rank",
            "tokens",
            "parameters",
            "dtype",
            "device",
        )
        rows = [
            (
                adapter.name,
                "active" if adapter.active else "not active",
                _TRAINED[adapter.trainable],
                str(adapter.sites),
                adapter.rank_text,
                str(sum(count for _, count in adapter.tokens) or ""),
                f"{adapter.parameters:,}",
                ", ".join(adapter.dtypes),
                ", ".join(adapter.devices),
            )
            for adapter in self
        ]
        return f"<div>{html_table(columns, rows, left=3)}{html_lines(self._remarks())}</div>"

    def __str__(self) -> str:
        lines = [str(adapter) for adapter in self.adapters] or ["no adapter"]
        return "\n".join([*lines, *self._remarks()])

    def _remarks(self) -> list[str]:
        lines: list[str] = []
        if self.per_sample:
            lines.append("each sample of a batch has one of the active adapters, or none")
        if self.by_hand:
            lines.append(f"trained by hand, beside the adapters: {some(self.by_hand)}")
        if self.unchecked:
            lines.append(
                "unchecked: no eager call of the model with these adapters has been watched yet"
            )
        lines += [
            f"{name} is computed as a whole at {location}" for name, location in self.computed
        ]
        return lines


@inside
def status(model: nn.Module) -> ModelStatus:
    """Return the state of each adapter of a rewritten model; ``str()`` has a line for each.

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
        tuple(
            (name, location)
            for name, locations in places_of(model).items()
            for location in locations
        ),
    )


def _status(model: nn.Module, name: str, adapter: AdapterRecord, active: bool) -> AdapterStatus:
    weights = {row.site.weight for row in adapter.sites} | set(adapter.given)
    trained: dict[int, nn.Parameter] = {id(p): p for p in adapter_parameters(model, name)}
    for own in adapter.own:
        value = own_value(model, name, own)
        if own not in weights and isinstance(value, nn.Parameter):
            trained[id(value)] = value
    frozen = frozen_parameters(model, name, adapter.sites)
    wanting = {
        p.requires_grad for key, p in trained.items() if p.is_floating_point() and key not in frozen
    }
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
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()})),
        devices=tuple(sorted({str(p.device) for p in trained.values()})),
        waits=not adapter.initialized,
        tokens=tuple((row.name, len(row.indices)) for row in adapter.tokens if not row.tied),
    )
