"""Runs passes in order and names the pass in every error."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lora_fx._config_starts import needs_data
from lora_fx.config import LoraConfig
from lora_fx.errors import CaptureError, ConfigError, LoraFxError
from lora_fx.ops import check_adapter_name
from lora_fx.passes._buffers import buffer_digests
from lora_fx.passes._region import install
from lora_fx.passes._start_place import changed_weights
from lora_fx.passes.add_factors import AddFactors
from lora_fx.passes.capture.auto import Frontend
from lora_fx.passes.capture.auto import capture as capture_model
from lora_fx.passes.capture.check import run_reference
from lora_fx.passes.capture.written_out import written_out
from lora_fx.passes.find_head import find_head
from lora_fx.passes.find_parts import find_parts
from lora_fx.passes.insert import Insert
from lora_fx.passes.match import match
from lora_fx.passes.merge import record_of
from lora_fx.passes.plan import make_plan
from lora_fx.passes.unfreeze import Unfreeze
from lora_fx.types import AdapterRecord, Capture, Pass, Plan, Record, Region

__all__ = ["build", "plan_capture", "plan_model", "rewrite_model", "run_passes"]

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
    if not isinstance(config, LoraConfig):
        found = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"config must be a lora_fx.LoraConfig, found {found}; "
            "lora_fx.LoraConfig.from_dict(config.to_dict()) takes over PEFT's"
        )
    if record_of(model) is not None:
        raise ConfigError(
            "the model is rewritten already: use lora_fx.add_adapter to put another adapter on it, "
            "or rewrite the original model, which was not changed"
        )
    capture = capture_model(model, example_inputs, frontend=frontend)
    return capture, plan_capture(capture, config, strict=strict)


def plan_capture(capture: Capture, config: LoraConfig, *, strict: bool = False) -> Plan:
    """Matches, finds the head and plans: everything that looks and nothing that edits."""
    matches = find_parts(capture, find_head(capture, match(capture)))
    return make_plan(capture, matches, config, strict=strict)


def rewrite_model(
    model: nn.Module,
    config: Any,
    example_inputs: Any = None,
    *,
    adapter_name: str = "default",
    strict: bool = False,
    frontend: Frontend = "auto",
) -> nn.Module:
    """Captures, plans, inserts and builds; see :func:`lora_fx.rewrite`."""
    check_adapter_name(adapter_name)
    capture, plan = plan_model(model, config, example_inputs, strict=strict, frontend=frontend)
    passes = (AddFactors(plan, adapter_name), Insert(plan, adapter_name), Unfreeze(plan))
    capture = run_passes(capture, passes)
    result = build(capture, plan, model, adapter_name)
    if example_inputs is not None and not any(p.is_meta for p in model.parameters()):
        # A call that no graph takes is refused where an adapter would be left out: better now than later.
        run_reference(result, example_inputs)
    return result


def build(capture: Capture, plan: Plan, original: nn.Module, adapter_name: str) -> nn.Module:
    """Makes the module that runs: installs every region and leaves the record on the root."""
    install(_running(capture, plan))
    bases, originals = changed_weights(capture.model, original, plan.sites)
    adapter = AdapterRecord(
        plan.config,
        plan.sites,
        plan.saved_modules,
        plan.biases,
        bases,
        initialized=not needs_data(plan.config.init_lora_weights),
    )
    trainable = frozenset(name for name, p in original.named_parameters() if p.requires_grad)
    capture.model.__dict__["_lora_fx"] = Record(
        adapters={adapter_name: adapter},
        frontend=plan.frontend,
        trainable=trainable,
        buffers=buffer_digests(capture.model),
        originals=originals,
    )
    return capture.model


def _running(capture: Capture, plan: Plan) -> Iterator[Region]:
    """The regions that run their graph: what was written out does so only where an adapter is.

    Elsewhere a layer keeps its own forward, with its fast paths.
    """
    calls = [f"{call.region}." for row in plan.sites for call in row.site.calls]
    for region in capture.regions.values():
        adapted = any(name.startswith(f"{region.fqn}.") for name in calls)
        if adapted or not region.fqn or written_out(region.module) is None:
            yield region
