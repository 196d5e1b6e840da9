"""Grouped convolutions as PEFT trains them: every row of A reads all input channels.

PEFT's A of a convolution with g groups is dense, [r, in, *k], and its B is grouped, [out, r/g, 1, ...]. The
convolution itself has a weight [out, in/g, *k]. So a weight can hold the sum only if the rows of A for each
group are zero outside of the channels of that group. A folder whose A is of that form loads as plain LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from lora_fx.config import LoraConfig
from lora_fx.errors import MergeError
from lora_fx.ir import Factors, OutputBuilder, Pattern, Region, Role, Site
from lora_fx.kinds import AdapterKind
from lora_fx.kinds.lora import Lora

__all__ = ["KINDS", "DenseGroups", "between_groups", "of_groups"]


def of_groups(b: Tensor, groups: int) -> Tensor:
    """Return the B of a grouped convolution, [out, r/g, ...], as a dense one, [out, r, ...]."""
    blocks = b.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]
    dense = b.new_zeros(groups, blocks.shape[1], groups, *b.shape[1:])
    index = torch.arange(groups, device=b.device)
    dense = dense.index_put(
        (index, torch.arange(blocks.shape[1], device=b.device)[:, None], index),
        blocks.transpose(0, 1),
    )
    return dense.flatten(0, 1).flatten(1, 2)


def between_groups(a: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Split a dense A, [r, in, ...], into its blocks, [r, in/g, ...], and all other values.

    Returns:
        The values for the channels of each row's own group, and the tensor without them.
    """
    rows = a.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # type: ignore[no-untyped-call]
    index = torch.arange(groups, device=a.device)
    own = rows[index, :, index]
    rest = rows.detach().clone()
    rest[index, :, index] = 0
    return own.flatten(0, 1), rest


class DenseGroups(Lora):
    """LoRA whose A reads all input channels of a grouped convolution; other sites have plain LoRA."""

    in_parts = False

    def __init__(self, bias: bool = False) -> None:
        super().__init__(bias)
        self.deploys = False
        self.name = f"dense-groups{'-bias' if bias else ''}"
        self.field = "dense_groups"
        also = f", and {self.trains}" if bias else ""
        self.trains = f"an A that reads all groups of a convolution (dense_groups){also}"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a configuration that choose it."""
        return ("dense_groups", "lora_bias") if self.bias else ("dense_groups",)

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return plain LoRA for a site without groups. PEFT has no transposed convolutions."""
        return self if site.groups > 1 and site.layout == "out_in" else Lora(self.bias)

    def config_for(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
        """Choose this kind for a folder in which the A of any grouped convolution mixes groups."""
        if config.use_dora or config.kind is not None or config.dense_groups:
            return config
        for key, a in tensors.items():
            b = tensors.get(f"{key.removesuffix('lora_A.weight')}lora_B.weight")
            if not key.endswith("lora_A.weight") or b is None or a.dim() < 3 or not b.shape[1]:
                continue
            groups, left = divmod(a.shape[0], b.shape[1])
            fits = not left and groups > 1 and not (a.shape[1] % groups or b.shape[0] % groups)
            if fits and between_groups(a, groups)[1].any():
                return dataclasses.replace(config, dense_groups=True)
        return config

    def without_bias(self) -> AdapterKind:
        """Return the kind without a bias: B's bias is added to that of the layer."""
        return KINDS[0]

    # --- factors ----------------------------------------------------------------------------------

    def factors(self, site: Site, shapes: Factors) -> Factors:
        """Return A [r, in, *k], and B as for plain LoRA."""
        rank, inner, *kernel = shapes.a
        return dataclasses.replace(shapes, a=(rank, inner * site.groups, *kernel))

    def pair(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A without the channels of other groups, if it is zero there."""
        own, rest = between_groups(a, site.groups)
        if rest.any():
            raise MergeError(
                f"A reads channels that a convolution with {site.groups} groups does not (dense_groups, as "
                "PEFT trains it): no weight of that shape holds the sum, and PEFT merges none either. Keep "
                "the adapter unmerged, or train it without dense_groups"
            )
        return own, b

    def flops(self, pattern: Pattern, site: Site, rank: int) -> int:
        """Return the FLOPs of a branch without groups."""
        return pattern.flops(dataclasses.replace(site, groups=1), rank)

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write B as a dense matrix: the branch is a convolution without groups."""
        if letter == "a":
            return stored
        return build.call(Role.FACTOR, of_groups, stored, build.site.groups)

    def branch(
        self, pattern: Pattern, node: fx.Node, region: Region, build: OutputBuilder
    ) -> fx.Node:
        """Write the branch of a convolution without groups."""
        site = dataclasses.replace(build.site, groups=1)
        return pattern.branch(site, node, region, build)


KINDS = (DenseGroups(), DenseGroups(bias=True))
