"""A model with one adapter at every place that any adapter may have: what swappable exports are made of.

The places are those of all adapters of a rewritten model, or, of a plain one, every linear operation but
the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import fx, nn

from lora_fx.adapters.switching import base_capture, run_with
from lora_fx.config.lora_config import LoraConfig
from lora_fx.errors import ExportError, NoMatchError
from lora_fx.ir.record import AdapterRecord, Choice, Record, record_of, require_record
from lora_fx.ir.values import Plan, PlannedSite, Region
from lora_fx.passes.graph.copies import share_copy
from lora_fx.passes.graph.edit import edit_graphs
from lora_fx.passes.graph.nodes import erase_dead, target_of
from lora_fx.passes.graph.region import copy_graph, install
from lora_fx.passes.merge.strip import stripped
from lora_fx.passes.parameters.factors import drop_factors
from lora_fx.passes.pipeline import added, branch_passes, rewrite_model, run_passes, running
from lora_fx.runtime import dora

__all__ = ["ADAPTER", "Swappable", "base_of", "check_swappable", "swappable", "with_adapter"]

ADAPTER = "inputs"
"""What the one adapter is called."""


@dataclasses.dataclass(frozen=True)
class Swappable:
    """A copy of a model over the same weights, with the one adapter.

    Attributes:
        model: The copy. Its graphs have the canonical form, with scale 1 and without dropout.
        rows: Where the adapter is.
        record: What is known of the copy, which does not carry it.
    """

    model: nn.Module
    rows: tuple[PlannedSite, ...]
    record: Record


def swappable(model: nn.Module) -> Swappable:
    """Makes the copy.

    Args:
        model: A plain or a rewritten model. It is not changed.

    Raises:
        ExportError: An adapter trains something that has no factors.
        NoMatchError: A plain model has no operation to adapt, with what to do.
        CaptureError: As :func:`lora_fx.rewrite`, for a plain model.
    """
    record = record_of(model)
    if record is None:
        model = _rewritten(model)
        record = require_record(model)
    for name, adapter in record.adapters.items():
        check_swappable(name, adapter)
    rows = _union(record)
    if not rows:
        raise ExportError("no adapter of the model is at an operation: there is nothing to swap")
    twin = share_copy(model)
    run_with(twin, dataclasses.replace(record, chosen=Choice(), blocks=()), anew=True)
    for name in record.adapters:
        drop_factors(twin, name)
    bare = dataclasses.replace(require_record(twin), adapters={}, chosen=None, optimize=False)
    capture = base_capture(twin, bare)
    plan = Plan(rows, (), (), (), LoraConfig(), capture.frontend)
    bare = added(capture, bare, plan, ADAPTER)
    capture = run_passes(capture, branch_passes(bare.adapters, optimize=False))
    install(running(edit_graphs(capture, _with_given_gains).capture, rows))
    del twin.__dict__["_lora_fx"]  # it is no rewritten model any more: nobody switches its adapters
    return Swappable(twin, rows, bare)


def _rewritten(model: nn.Module) -> nn.Module:
    try:
        return rewrite_model(model, LoraConfig(), optimize=False)
    except NoMatchError as error:
        reason = str(error).split("\n", 1)[-1].strip()
        raise NoMatchError(
            "the model has no adapters, and adapters='inputs' then takes one at every linear operation but "
            f"the head, of which there is none ({reason}): rewrite the model first, with what to adapt in "
            "target_modules, or export it with adapters='merge'"
        ) from error


def base_of(model: nn.Module) -> nn.Module:
    """The model without adapters: a copy over the same weights, or the model itself if it is a plain one."""
    record = record_of(model)
    return model if record is None else stripped(model, record)


def with_adapter(model: nn.Module, name: str) -> nn.Module:
    """A copy of a rewritten model over the same weights in which one adapter is active."""
    twin = share_copy(model)
    record = require_record(twin)
    run_with(twin, dataclasses.replace(record, chosen=Choice((name,)), blocks=()), anew=True)
    return twin


def check_swappable(name: str, adapter: AdapterRecord) -> None:
    """Refuses an adapter that does more than add a product of low rank.

    Raises:
        ExportError: With everything that is more.
    """
    more = list(dict.fromkeys(_more(adapter)))
    if more:
        raise ExportError(
            f"the adapter {name!r} cannot be an input of a file: {'; '.join(more)}. Only factors can be "
            "swapped: merge it into a file of its own, with export_onnx(..., adapters='merge')"
        )


def _more(adapter: AdapterRecord) -> Iterator[str]:
    start = adapter.config.init_lora_weights
    if start == "loftq":
        yield "its base was quantised for it (init_lora_weights='loftq')"
    yield from (f"{name} is trained in full (modules_to_save)" for name in adapter.saved_modules)
    inside = tuple(f"{name}." for name in adapter.saved_modules)
    yield from (
        f"{name} is trained (bias)" for name in adapter.biases if not name.startswith(inside)
    )
    yield from (
        f"rows of {row.name} are trained (trainable_token_indices)" for row in adapter.tokens
    )
    yield from (f"{name} came with its folder" for name in adapter.given)
    if not adapter.initialized:
        yield f"it waits for data (init_lora_weights={start!r}): lora_fx.initialize gives it some"


def _union(record: Record) -> tuple[PlannedSite, ...]:
    """Every place of an adapter, once, with whatever any of them has there."""
    found: dict[str, PlannedSite] = {}
    for row in (row for adapter in record.adapters.values() for row in adapter.sites):
        before = found.get(row.name, row)
        found[row.name] = dataclasses.replace(
            row,
            rank=row.site.groups,
            alpha=1.0,
            scale=1.0,
            dropout=0.0,
            # A tied head gets the embedding's factors as values of its own.
            tied="",
            dora=row.dora or before.dora,
            lora_bias=row.lora_bias or before.lora_bias,
        )
    return tuple(found.values())


def _with_given_gains(region: Region) -> fx.Graph | None:
    """DoRA without its norms: the gain is given in the place of the magnitude, and is in B already."""
    if not any(target_of(node) is dora.gain for node in region.graph.nodes):
        return None
    graph = copy_graph(region.graph)
    for node in _calls(graph, (dora.gain, dora.steered)):
        given = node.args[0]
        assert isinstance(given, fx.Node)
        node.replace_all_uses_with(given)
    erase_dead(graph)
    graph.lint()
    return graph


def _calls(graph: fx.Graph, targets: Iterable[object]) -> list[fx.Node]:
    wanted = tuple(targets)
    return [node for node in graph.nodes if any(target_of(node) is one for one in wanted)]
