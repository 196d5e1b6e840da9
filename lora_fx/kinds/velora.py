"""VeLoRA (Miles et al. 2024, arXiv:2405.17991): LoRA that saves compressed inputs for the gradient of A.

The features of an input vector are cut into groups. Each group is saved as its product with one unit vector,
the projection. The backward reconstructs the input from these products to compute the gradient of A.
Everything else is as in LoRA: outputs, the gradient of the input, merges.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from lora_fx.config import complete_options
from lora_fx.ir import OutputBuilder, Pattern, Region, Role, Site
from lora_fx.kinds import Costs, Slot, Starting
from lora_fx.kinds.lora import Lora, layer_objection

__all__ = ["KINDS", "Velora", "down"]

_PROJECTION: Final = "lora_velora_embed"
_STARTED: Final = "lora_velora_initialized"


class Velora(Lora):
    """Two factors, and the projection of each layer, which is state."""

    in_parts = False

    def __init__(self, bias: bool = False) -> None:
        super().__init__(bias)
        self.name = "velora-bias" if bias else "velora"
        self.deploys = False
        self.fields = ("velora_config", "lora_bias") if bias else ("velora_config",)
        self.options = complete_options(self.fields[0], {})

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return B's bias, if B has one, and the projection, [⌈in / groups⌉].

        With "batch_average_once", also return a flag that the projection is computed. As in PEFT, no folder
        has the flag, so that a loaded adapter computes its projection from its first batch.
        """
        size = (_group_size(site.in_features, self._groups),)
        state: dict[str, Any] = {"over_outputs": False, "trained": False}
        projection = Slot(_PROJECTION, _PROJECTION, size, "a projection", **state)
        slots = (*super().slots(site), projection)
        if self._start != "batch_average_once":
            return slots
        return (*slots, Slot(_STARTED, "", (1,), "a projection", **state))

    @property
    def _groups(self) -> int:
        assert self.options is not None
        groups: int = self.options["num_groups"]
        return groups

    @property
    def _start(self) -> str:
        assert self.options is not None
        start: str = self.options["init_type"]
        return start

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the cost of the projection. One number for each group is saved instead of the input."""
        bias, flops = super().costs(site, rank), 2 * site.in_features
        saved = self._groups - site.in_features
        return Costs(bias.parameters, bias.flops + flops, bias.saved + saved)

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have VeLoRA; None if it can. Only linear layers can."""
        return layer_objection("VeLoRA", self, site)

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return a random unit vector, or zeros until there is a batch."""
        if slot.trained:
            return super().start(slot, starting)
        values = torch.zeros(slot.sized(starting.row.rank))
        if slot.name == _PROJECTION and self._start == "random":
            values.normal_(generator=starting.generator(f"{starting.row.name}.{_PROJECTION}"))
            return _normalized(values)
        return values

    def branch(
        self, pattern: Pattern, node: fx.Node, region: Region, build: OutputBuilder
    ) -> fx.Node:
        """Write the branch of a layer with an ``A x`` that saves compressed inputs."""
        assert self.options is not None
        once = self._start == "batch_average_once"
        started = build.read_slot(_STARTED) if once else None
        state = (build.read_slot(_PROJECTION), started, build.training)
        options = (self._groups, self.options["scale"], self._start != "random")
        x = build.dropped(build.input)
        product = build.call(Role.DOWN, down, x, build.a, *state, *options)
        return build.call(Role.UP, F.linear, product, build.b)


def down(
    x: Tensor,
    a: Tensor,
    projection: Tensor,
    started: Tensor | None,
    training: bool,
    groups: int,
    scale: float,
    averages: bool,
) -> Tensor:
    """Return ``x Aᵀ``, [..., r]. If a gradient may follow, save the compressed input.

    Args:
        x: [..., in].
        a: A, [r, in].
        projection: [⌈in / groups⌉], which a training call overwrites if it averages.
        started: Set to 1 by the first batch, after which the projection does not change. None if each batch
            computes the projection.
        training: True in training mode.
        groups: Number of groups of features.
        scale: The number by which the reconstructed input is multiplied.
        averages: True if the projection is the mean direction of the groups in a batch.
    """
    if not (training and torch.is_grad_enabled()):
        return F.linear(x, a)
    if averages:
        with torch.no_grad():
            mean = _grouped(x.detach(), groups).flatten(0, 1).mean(0)
            new = _normalized(mean).to(projection)
            if started is not None:
                new = torch.where(started > 0, projection, new)
                started.fill_(1)
            projection.copy_(new)
        # Save the new tensor and not the state, which the next forward may overwrite before the backward.
        projection = new
    product: Tensor = _Down.apply(x, a, projection, groups, scale)  # type: ignore[no-untyped-call]
    return product


class _Down(torch.autograd.Function):
    """A product whose gradient of A is computed from a compressed input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, projection: Tensor, groups: int, scale: float
    ) -> Tensor:
        compressed = _grouped(x, groups) @ projection.to(x.dtype)
        ctx.save_for_backward(compressed, a, projection)
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        return F.linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compressed, a, projection = ctx.saved_tensors
        grad_x = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ a.to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            groups = compressed.to(grad.dtype)[..., None] * projection.to(grad.dtype)
            x = groups.flatten(1)[:, : ctx.shape[-1]] * ctx.scale
            grad_a = (rows.mT @ x).to(a.dtype)
        return grad_x, grad_a, None, None, None


def _group_size(features: int, groups: int) -> int:
    return -(-features // groups)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Cut the features of all vectors into groups, [n, groups, size]. Zeros fill the last group."""
    size = _group_size(x.shape[-1], groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def _normalized(vector: Tensor) -> Tensor:
    """Return the vector with norm 1, in fp32. A vector of zeros becomes a vector of equal values."""
    vector = vector.float()
    norm = torch.linalg.vector_norm(vector)
    ones = torch.ones_like(vector)
    return torch.where(norm > 0, vector / norm, ones / torch.linalg.vector_norm(ones))


KINDS = (Velora(), Velora(bias=True))
