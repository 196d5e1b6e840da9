"""LoRA (Hu et al. 2021, arXiv:2106.09685): ``y + s · B A x``, and optionally a trained bias on B."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, fx

from lora_fx.ir import OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind, Costs, Slot, Starting
from lora_fx.runtime.kernels import fused_lora
from lora_fx.runtime.rows import fused_rows

__all__ = ["BIAS", "KINDS", "Lora", "bias_slot", "bias_start", "layer_objection"]

BIAS: Final = "lora_bias"
"""Name of the slot of B's bias."""


def bias_slot(site: Site) -> Slot:
    """Return the slot of B's bias."""
    shape = (site.out_features,)
    return Slot(BIAS, "lora_B.bias", shape, "a bias on B", scaled=True, role="bias")


def bias_start(starting: Starting) -> Tensor:
    """Return the initial bias on B: zeros, or uniform numbers as in ``nn.Linear`` if B starts random, too."""
    site = starting.row.site
    bias = torch.zeros(site.out_features)
    if starting.config.init_lora_weights is False:
        bound = 1 / math.sqrt(starting.row.rank // site.groups)
        bias.uniform_(-bound, bound, generator=starting.generator(f"{site.name}.{BIAS}"))
    return bias


def layer_objection(method: str, kind: AdapterKind, site: Site) -> str | None:
    """Return why a site cannot have a variant of LoRA that is for linear layers only; None if it can.

    Args:
        method: The name of the variant.
        kind: Its kind.
        site: The site.
    """
    if site.is_layer:
        return None
    remedy = f"leave it out, or {kind.remedy}"
    return f"{method} is for linear layers with a weight of their own (as in PEFT): {remedy}"


class Lora(AdapterKind):
    """Two factors and, with ``bias``, a vector that is added to the output of B."""

    does = "a bias on B adds to"
    in_parts = True

    def __init__(self, bias: bool = False) -> None:
        self.bias = bias
        self.deploys = not bias
        self.name = "lora-bias" if bias else "lora"
        self.fields = ("lora_bias",) if bias else ()
        self.trains = "a bias on B (lora_bias)" if bias else ""

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the slot of B's bias, if B has one."""
        return (bias_slot(site),) if self.bias else ()

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of B's bias, if B has one: an addition for each output feature."""
        return Costs(site.out_features, site.out_features) if self.bias else Costs()

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have this kind; None if it can.

        An embedding cannot have a bias on B, because a lookup has no product that a bias could follow.
        """
        if self.bias and site.family == "embedding":
            return (
                "an embedding has no bias on B (as in PEFT): leave it out, or set lora_bias=False"
            )
        return super().objection(site, rank)

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return the initial values of B's bias, or of a slot of a subclass."""
        return bias_start(starting) if slot.name == BIAS else super().start(slot, starting)

    def branch_bias(self, build: OutputBuilder) -> fx.Node | None:
        """Write B's bias, if B has one."""
        return build.cast_slot(BIAS) if self.bias else None

    def without_bias(self) -> AdapterKind:
        """Return the kind without B's bias, because that is added together with the layer's bias."""
        return type(self)().with_options(self.options) if self.bias else self

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write ``total + pad(up · s)``."""
        assert up is not None
        if not self.bias:
            self.fuse(build)
        elif not build.bias_taken:
            bias = build.bias
            assert bias is not None
            up = build.call(Role.UP, operator.add, up, build.spread(bias))
        scaled = build.call(Role.SCALE, operator.mul, up, build.scale)
        return build.call(Role.ADD, operator.add, build.total, build.padded(scaled))

    def fuse(self, build: OutputBuilder) -> None:
        """Tell the builder which functions compute the operation with its branch."""
        rows = (fused_rows.lora_rows, fused_rows.quantized_lora_rows)
        build.fuse_by(fused_lora.lora_linear, quantized=fused_lora.quantized_lora_linear, rows=rows)

    def bias_terms(
        self, bias: Tensor | None, values: Mapping[str, Tensor], scale: float
    ) -> Sequence[tuple[Tensor, float]]:
        """Return ``s`` times B's bias, if B has one."""
        return ((values[BIAS], scale),) if self.bias else ()


KINDS = (Lora(), Lora(bias=True))
