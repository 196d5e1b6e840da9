"""Grouped convolutions as PEFT trains them: every row of A reads all input channels.

PEFT's A of a convolution with g groups is dense, [r, in, *k], and its B is grouped, [out, r/g, 1, ...]. The
convolution itself has a weight [out, in/g, *k]. So an adapter can be merged into the weight only if the rows
of A for each group are zero outside of the channels of that group. A folder with such an A is loaded as plain
LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from lora_fx.config import LoraConfig
from lora_fx.errors import MergeError
from lora_fx.ir import Factors, OutputBuilder, Pattern, Region, Role, Site
from lora_fx.kinds import AdapterKind, Costs, Slot, Starting
from lora_fx.kinds.dora import MAGNITUDE, Dora
from lora_fx.kinds.lora import Lora
from lora_fx.runtime.kernels import dora, grouped

__all__ = ["KINDS", "DenseDora", "DenseLora"]


class _Dense(AdapterKind):
    """Base class of LoRA and DoRA with an A that reads all input channels."""

    in_parts = False
    deploys = False

    def config_for(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
        """Set ``dense_groups`` if an adapter folder has a grouped convolution whose A mixes groups."""
        if config.kind is not None or config.dense_groups:
            return config
        for key, a in tensors.items():
            b = tensors.get(f"{key.removesuffix('lora_A.weight')}lora_B.weight")
            if not key.endswith("lora_A.weight") or b is None or a.dim() < 3 or not b.shape[1]:
                continue
            groups, left = divmod(a.shape[0], b.shape[1])
            fits = not left and groups > 1 and not (a.shape[1] % groups or b.shape[0] % groups)
            if fits and grouped.between_groups(a, groups)[1].any():
                return dataclasses.replace(config, dense_groups=True)
        return config

    # --- factors ----------------------------------------------------------------------------------

    def factors(self, site: Site, shapes: Factors) -> Factors:
        """Return A [r, in, *k], and B as for plain LoRA."""
        rank, inner, *kernel = shapes.a
        return dataclasses.replace(shapes, a=(rank, inner * site.groups, *kernel))

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of a plain kind, plus the FLOPs that dense groups add for one position."""
        costs, kernel = super().costs(site, rank), math.prod(site.weight_shape[2:])
        elements = rank * (site.in_features * kernel + site.out_features)
        more = 2 * (elements - elements // site.groups)
        return dataclasses.replace(costs, flops=costs.flops + more)

    def merged_factors(
        self, site: Site, a: Tensor, b: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return A without the channels of other groups. Raise if A is not zero there."""
        own, outside = grouped.between_groups(a, site.groups)
        if outside.any():
            raise MergeError(
                f"A reads channels that a convolution with {site.groups} groups does not (dense_groups, as "
                "PEFT trains it): no weight of that shape holds the sum, and PEFT merges none either. Keep "
                "the adapter unmerged, or train it without dense_groups"
            )
        return own, b

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write B as a dense matrix: the branch is a convolution without groups."""
        if letter == "a":
            return stored
        return build.call(Role.FACTOR, grouped.of_groups, stored, build.site.groups)

    def branch(
        self, pattern: Pattern, node: fx.Node, region: Region, build: OutputBuilder
    ) -> fx.Node:
        """Write the branch of a convolution without groups."""
        site = dataclasses.replace(build.site, groups=1)
        return pattern.branch(site, node, region, build)


def _is_dense(site: Site) -> bool:
    """Return True for a convolution with groups. PEFT has no transposed ones."""
    return site.groups > 1 and site.layout == "out_in"


class DenseLora(_Dense, Lora):
    """LoRA whose A reads all input channels of a grouped convolution; other sites have plain LoRA."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__(bias)
        self.deploys = False
        self.name = "dense-groups-bias" if bias else "dense-groups"
        self.fields = ("dense_groups", "lora_bias") if bias else ("dense_groups",)
        also = f", and {self.trains}" if bias else ""
        self.trains = f"an A that reads all groups of a convolution (dense_groups){also}"

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return plain LoRA for a site without groups."""
        return self if _is_dense(site) else Lora(self.bias)

    def without_bias(self) -> AdapterKind:
        """Return the kind without a bias, because B's bias is added together with the layer's bias."""
        return KINDS[0]


class DenseDora(_Dense, Dora):
    """DoRA with an A that reads all input channels.

    Its gain is PEFT's (:func:`lora_fx.runtime.kernels.dora.dense_gain`).
    """

    constants: tuple[Any, ...] = ()
    handed: tuple[Any, ...] = ()
    dynamic = (
        "A reads channels that a convolution with groups does not (dense_groups with use_dora, as PEFT "
        "trains it; PEFT merges none either): keep the adapter unmerged, or train it without dense_groups"
    )

    def __init__(self) -> None:
        super().__init__()
        self.name = "dense-groups-dora"
        self.fields = ("dense_groups", "use_dora")
        self.trains = (
            f"an A that reads all groups of a convolution (dense_groups), and {Dora.trains}"
        )

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return plain DoRA for a site without groups."""
        return self if _is_dense(site) else Dora()

    def without_bias(self) -> AdapterKind:
        """Return the kind itself: B has no bias."""
        return self

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the magnitude. It has no norm, because PEFT divides it by another number than a norm."""
        return tuple(dataclasses.replace(slot, normed=False) for slot in super().slots(site))

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return PEFT's initial magnitude, with which the gain is 1."""
        assert starting.a is not None
        assert starting.b is not None
        row = starting.row
        return dora.dense_norm(starting.weight, starting.a, starting.b, row.scale)

    def new_gain(self, build: OutputBuilder) -> fx.Node:
        """Write the node that computes DoRA's gain as PEFT does: magnitude over norm."""
        return build.call(
            Role.MAGNITUDE,
            dora.dense_gain,
            build.read_slot(MAGNITUDE, Role.MAGNITUDE),
            build.read_weight(Role.MAGNITUDE),
            build.stored("a"),
            build.stored("b"),
            build.scale,
        )


KINDS = (DenseLora(), DenseLora(bias=True), DenseDora())
