"""What the adapters of a network with convolutions cost for one sample.

A convolution computes an output at each position, and layers differ in how many they have, so that costs for
one position do not add up. A run on the meta device, which computes shapes and nothing else, counts them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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
    looked_up = row.site.family == "embedding"  # by ids, one for each output
    of_inputs = 0 if looked_up else row.site.in_features * itemsize
    of_inputs += row.site.in_features * (itemsize + 1) if row.dropout else 0
    of_outputs = row.saved // applied - of_inputs
    # A transposed convolution multiplies with A at each position of its input.
    scattered = row.site.family == "conv" and row.site.layout == "in_out" and row.rank > 0
    kernel = math.prod(row.site.shape[2:])
    of_a = 2 * row.rank * row.site.in_features // row.site.groups * kernel if scattered else 0
    return (
        of_a * positions.inputs + (row.flops // applied - of_a) * positions.outputs,
        of_inputs * positions.inputs + of_outputs * positions.outputs,
    )


def _positions(
    model: nn.Module, sites: list[Site], example_inputs: Any
) -> tuple[int | None, dict[str, _Positions]]:
    """Count positions of each site over a batch, and the samples of the batch, 0 where they are not seen.

    They are what the first convolution takes as its batch, if an input has so many rows. A model that folds
    other axes into that batch (frames of videos), or goes through its samples one by one, has another number.
    """

    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    gpus = {one.device for one in tensors.values() if one.device.type == "cuda"}
    values = {name: value.detach().to("meta") for name, value in tensors.items()}
    products = _Products(sites, values, given)
    with torch.no_grad(), torch.random.fork_rng(devices=list(gpus)), products:
        torch.func.functional_call(model, values, args, kwargs)
    found = {name: one for name, one in products.found.items() if name not in products.elsewhere}
    return products.samples, found


class _Products(TorchFunctionMode):
    """Counts the positions of each product with the weight of a site.

    Args:
        sites: The sites.
        values: Tensors of the model by name.
        given: What the model is called with.

    Attributes:
        found: Name of a site to what was counted.
        elsewhere: Sites whose weight is also computed with otherwise.
        samples: Rows of the batch of the first convolution, if an input has so many; else 0.
    """

    def __init__(
        self, sites: Sequence[Site], values: Mapping[str, Tensor], given: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self._sites: dict[int, list[Site]] = defaultdict(list)
        for site in sites:
            if site.weight in values and not site.experts:
                self._sites[id(values[site.weight])].append(site)
        self._given = [(one.dim(), one.shape[:1]) for one in given]
        self.found: dict[str, _Positions] = defaultdict(_Positions)
        self.elsewhere: set[str] = set()
        self.samples: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Looks for weights among the arguments."""
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        if isinstance(out, Tensor):
            for weight in tensors:
                others = [one for one in tensors if one is not weight]
                for site in self._sites.get(id(weight), ()):
                    self._count(site, others, out)
        return out

    def _count(self, site: Site, others: Sequence[Tensor], out: Tensor) -> None:
        if not others:
            self.elsewhere.add(site.name)  # a view, say, with which something is multiplied later
            return
        x = max(others, key=Tensor.numel)  # the other one is a bias
        spatial = len(site.shape) - 2 if site.family == "conv" else 0
        found = self.found[site.name]
        found.inputs += x.numel() // x.shape[-1 - spatial]
        found.outputs += out.numel() // out.shape[-1 - spatial]
        if spatial and self.samples is None:
            alone = x.dim() == spatial + 1
            seen = any(d == x.dim() if alone else rows == x.shape[:1] for d, rows in self._given)
            self.samples = (1 if alone else x.shape[0]) if seen else 0
