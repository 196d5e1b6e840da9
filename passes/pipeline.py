"""Runs passes in order and names the pass in every error."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lora_fx.config import LoraConfig, needs_data
from lora_fx.errors import CaptureError, ConfigError, LoraFxError, NoMatchError
from lora_fx.formats import quantization_of
from lora_fx.ir import (
    AdapterRecord,
    Base,
    Capture,
    Matches,
    Pass,
    Plan,
    PlannedSite,
    PlannedTokens,
    Record,
    Region,
    module_of,
    record_of,
)
from lora_fx.passes.capture import Frontend, holds_quantised, written_out
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.graph import install, kept_graph
from lora_fx.passes.insert import AddFactors, AddTokens, Insert, SelectRows, TrainTokens, Unfreeze
from lora_fx.passes.match import find_head, find_parts, match
from lora_fx.passes.optimize import CheapDropout, Fuse, ShareInputs
from lora_fx.passes.oracle import check_rewritten
from lora_fx.passes.parameters import base_parameters, buffer_digests, mark_adapted, protect
from lora_fx.passes.plan import make_plan
from lora_fx.runtime import check_adapter_name, watch

__all__ = [
    "added",
    "branch_passes",
    "check_config",
    "check_trains",
    "matched",
    "plan_capture",
    "plan_model",
    "rewrite_model",
    "run_passes",
    "running",
]

_log = logging.getLogger("lora_fx")


def run_passes(capture: Capture, passes: Sequence[Pass]) -> Capture:
    """Runs passes one after the other.

    Raises:
        LoraFxError: As the pass raised it.
        CaptureError: For any other failure inside a pass, chained, with the pass's name.
    """
    for one in passes:
        try:
            result = one(capture)
        except LoraFxError:
            raise
        except Exception as error:
            raise CaptureError(
                f"pass {one.name!r} failed: {type(error).__name__}: {error}"
            ) from error
        _log.debug("pass %s: %s", one.name, "modified" if result.modified else "nothing to do")
        capture = result.capture
    return capture


def plan_model(
    model: nn.Module,
    config: Any,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    frontend: Frontend = "auto",
) -> tuple[Capture, Plan]:
    """Captures a model and plans its rewrite.

    Raises:
        ConfigError: If ``config`` is no :class:`LoraConfig`, or the model is rewritten already.
    """
    capture, _, plan = _planned(model, config, example_inputs, strict, frontend)
    return capture, plan


def _planned(
    model: nn.Module, config: LoraConfig, example_inputs: Any, strict: bool, frontend: Frontend
) -> tuple[Capture, Matches, Plan]:
    check_config(config)
    if record_of(model) is not None:
        raise ConfigError(
            "the model is rewritten already: use lora_fx.add_adapter to put another adapter on it, "
            "or rewrite the original model, which was not changed"
        )
    capture = capture_model(model, example_inputs, frontend=frontend)
    matches = matched(capture)
    return capture, matches, make_plan(capture, matches, config, strict=strict)


def plan_capture(capture: Capture, config: LoraConfig, *, strict: bool = False) -> Plan:
    """Matches, finds the head and plans: everything that looks and nothing that edits."""
    return make_plan(capture, matched(capture), config, strict=strict)


def matched(capture: Capture) -> Matches:
    """Every linear operation of a capture, the head and the parts of fused weights marked."""
    return find_parts(capture, find_head(capture, match(capture)))


def check_config(config: object) -> None:
    """Refuses what is no configuration of lora_fx.

    Raises:
        ConfigError: If it is something else, PEFT's for instance.
    """
    if not isinstance(config, LoraConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"config must be a lora_fx.LoraConfig, found {found}; "
            "lora_fx.LoraConfig.from_dict(config.to_dict()) takes over PEFT's"
        )


def rewrite_model(
    model: nn.Module,
    config: Any,
    example_inputs: Any = None,
    *,
    adapter_name: str = "default",
    optimize: bool = True,
    strict: bool = False,
    frontend: Frontend = "auto",
) -> nn.Module:
    """Captures, plans, inserts and builds; see :func:`lora_fx.rewrite`."""
    check_adapter_name(adapter_name)
    capture, matches, plan = _planned(model, config, example_inputs, strict, frontend)
    check_trains(plan)
    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    base = Base(
        graphs={fqn: region.graph for fqn, region in capture.regions.items()},
        fallback={fqn: region.fallback for fqn, region in capture.regions.items()},
        matches=matches,
        notes=capture.notes,
        kept=frozenset(name for name, module in model.named_modules() if kept_graph(module)),
    )
    record = Record(
        {}, (), capture.frontend, trainable, buffer_digests(capture.model), base, optimize=optimize
    )
    record = added(capture, record, plan, adapter_name)
    capture = run_passes(capture, branch_passes(record.adapters, optimize=optimize))
    install(running(capture, (*plan.sites, *plan.tokens)))
    result = capture.model
    mark_adapted(result, adapted=True)
    result.__dict__["_lora_fx"] = dataclasses.replace(record, active=(adapter_name,))
    protect(result)
    watch.arm(result)
    if example_inputs is not None and not any(p.is_meta for p in model.parameters()):
        # What would be refused or wrong when it is called: better now than later.
        check_rewritten(result, example_inputs)
    return result


def check_trains(plan: Plan) -> None:
    """Refuses a plan by which nothing would be trained: looking at one is all that it is for.

    Raises:
        NoMatchError: If it has no site, module, bias or row of an embedding.
    """
    if not (plan.sites or plan.saved_modules or plan.biases or plan.tokens):
        raise NoMatchError(
            "the configuration selects nothing, so that nothing would be trained: name operations in "
            "target_modules or target_parameters, or leave target_modules out to have all of them"
        )


def branch_passes(
    adapters: Mapping[str, AdapterRecord], *, optimize: bool, per_sample: bool = False
) -> list[Pass]:
    """What makes graphs with branches of graphs without.

    Args:
        adapters: Those whose branches are wanted, by name, in the order in which they are added.
        optimize: Whether branches are fused with their operations.
        per_sample: Whether each sample of a batch has one of the adapters, or none.
    """
    passes: list[Pass] = [Insert(one.sites, name) for name, one in adapters.items()]
    passes += [TrainTokens(one.tokens, name) for name, one in adapters.items()]
    if per_sample:
        return [*passes, SelectRows()]
    return [*passes, Fuse(), ShareInputs(), CheapDropout()] if optimize else passes


def added(capture: Capture, record: Record, plan: Plan, adapter_name: str) -> Record:
    """Gives the model of a capture the parameters of one more adapter.

    Args:
        capture: A model in which no other adapter has a parameter in the place of one of the base.
        record: What is known of it.
        plan: What the adapter is.
        adapter_name: Its name.

    Returns:
        The record with the adapter, which is not active yet: no graph is changed.

    Raises:
        ConfigError: If it would have its own value of a parameter that is trained by hand.
    """
    before = base_parameters(capture.model)
    _check_frozen(before, plan)
    run_passes(
        capture,
        [AddFactors(plan, adapter_name), AddTokens(plan.tokens, adapter_name), Unfreeze(plan)],
    )
    after = base_parameters(capture.model)
    own = tuple(name for name, parameter in after.items() if parameter is not before[name])
    adapter = AdapterRecord(
        plan.config,
        plan.sites,
        plan.saved_modules,
        plan.biases,
        own,
        tokens=plan.tokens,
        initialized=not needs_data(plan.config.init_lora_weights),
    )
    originals = {name: before[name].detach() for name in own}
    return dataclasses.replace(
        record,
        adapters={**record.adapters, adapter_name: adapter},
        originals={**record.originals, **originals},
    )


def _check_frozen(parameters: Mapping[str, nn.Parameter], plan: Plan) -> None:
    """Refuses to train as part of an adapter what is trained by hand: an optimizer has the base's own."""
    inside = tuple(f"{name}." for name in plan.saved_modules)
    for name, parameter in parameters.items():
        if parameter.requires_grad and (name in plan.biases or name.startswith(inside)):
            raise ConfigError(
                f"{name} was unfrozen by hand, and the adapter is to have its own value of it "
                "(modules_to_save, bias): freeze it first, with requires_grad_(False). The adapter starts "
                "with what it is then"
            )


def running(capture: Capture, rows: Iterable[PlannedSite | PlannedTokens]) -> Iterator[Region]:
    """The regions that run their graph: what was written out does so only where an adapter is.

    Elsewhere a layer keeps its own forward, with its fast paths, unless they would read quantized weights. A
    layer of bitsandbytes never does: its forward changes what the graph has read of it.
    """
    calling: set[str] = set()  # where branches are, and the modules above
    for name in [module_of(call.region) for row in rows for call in row.site.calls]:
        while name and name not in calling:
            calling.add(name)
            name = name.rpartition(".")[0]
    for region in capture.regions.values():
        adapted = region.fqn in calling
        plain = not region.fqn or written_out(region.module) is None
        stored = quantization_of(region.module._parameters.get("weight")) is not None
        if adapted or plain or stored or holds_quantised(region.module):
            yield region
