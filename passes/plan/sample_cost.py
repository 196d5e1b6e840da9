"""What the adapters of a network with convolutions cost for one sample.

A convolution computes an output at each position, and layers differ in how many they have, so that costs for
one position do not add up. A run on the meta device, which computes shapes and nothing else, counts them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.ir import Capture, Plan, PlannedSite, Site
from lora_fx.passes.capture import normalize, synthesise
from lora_fx.passes.parameters import base_dtype

__all__ = ["with_sample_cost"]

_log = logging.getLogger("lora_fx")


@dataclasses.dataclass
class _Positions:
    inputs: int = 0
    outputs: int = 0


def with_sample_cost(plan: Plan, capture: Capture, example_inputs: Any) -> Plan:
    """Return a plan that says what a sample costs, if it has convolutions and the inputs are known.

    Args:
        plan: The plan.
        capture: What it was made for: a copy of the user's model, whose modules are called.
        example_inputs: As for :func:`lora_fx.plan`; None for inputs that the model says it takes.
    """
    if plan.unit == "token":
        return plan
    inputs = synthesise(capture.model).inputs if example_inputs is None else example_inputs
    if inputs is None:
        return plan
    try:
        samples, found = _positions(capture.model, [row.site for row in plan.sites], inputs)
    except Exception as error:  # noqa: BLE001  whatever the user's code raises without values
        _log.debug("no cost of a sample: %s: %s", type(error).__name__, error)
        return plan
    if not samples or any(row.name not in found for row in plan.sites):
        return plan
    each = [_cost(capture.model, row, found[row.name]) for row in plan.sites]
    flops, saved = (sum(one) // samples for one in zip(*each, strict=True))
    return dataclasses.replace(plan, sample_cost=(flops, saved))


def _cost(model: nn.Module, row: PlannedSite, positions: _Positions) -> tuple[int, int]:
    """FLOPs and bytes of a site for all positions of a batch."""
    applied = max(Counter(call.region for call in row.site.calls).values())
    itemsize = base_dtype(model, row.site).itemsize
    of_inputs = row.site.in_features * itemsize
    of_inputs += row.site.in_features * (itemsize + 1) if row.dropout else 0
    of_outputs = row.saved // applied - of_inputs
    return (
        row.flops // applied * positions.outputs,
        of_inputs * positions.inputs + of_outputs * positions.outputs,
    )


def _positions(
    model: nn.Module, sites: list[Site], example_inputs: Any
) -> tuple[int, dict[str, _Positions]]:
    """Count positions of each site over a batch, and the samples of the batch."""
    found: dict[str, _Positions] = defaultdict(_Positions)
    batches: list[int] = []

    def count(site: Site) -> Any:
        # The axis of the channels, from the end.
        spatial = len(site.shape) - 2 if site.family == "conv" else 0

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            x = args[0]
            found[site.name].inputs += x.numel() // x.shape[-1 - spatial]
            found[site.name].outputs += out.numel() // out.shape[-1 - spatial]
            if spatial:
                batches.append(x.shape[0] if x.dim() == spatial + 2 else 1)

        return hook

    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with contextlib.ExitStack() as stack, torch.no_grad():
        for site in sites:
            handle = model.get_submodule(site.owner).register_forward_hook(count(site))
            stack.callback(handle.remove)
        values = {name: value.detach().to("meta") for name, value in tensors.items()}
        torch.func.functional_call(model, values, args, kwargs)
    return (batches[0] if batches else 0), dict(found)
