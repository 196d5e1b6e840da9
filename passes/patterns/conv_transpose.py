"""Transposed convolutions: ``y' = convᵀ(x, W) + s · conv₁(convᵀ(x, Aᵀ), B)``.

The weight is stored [in, out, *k]. A is [r, in, *k], rank first as everywhere, and is read with its first two
dimensions swapped; it has the base operation's stride, padding, output padding and dilation. B is a 1 x 1
convolution [out, r, 1, ...]. So ΔW[i, o] = s · Σᵣ B[o, r] A[r, i], kernel by kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.passes._fx import arguments, target_of
from lora_fx.passes._weights import weight_of
from lora_fx.passes.patterns.sites import computed, make_site, reject
from lora_fx.types import BranchBuilder, Factors, Match, Region, Role, Site

__all__ = ["ConvTransposePattern"]

_aten = torch.ops.aten
_FUNCTIONS: dict[int, tuple[Any, ...]] = {
    1: (F.conv_transpose1d, _aten.conv_transpose1d.default),
    2: (F.conv_transpose2d, _aten.conv_transpose2d.input),
    3: (F.conv_transpose3d, _aten.conv_transpose3d.input),
}
_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SIGNATURE = "input weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1"


@dataclasses.dataclass(frozen=True)
class ConvTransposePattern:
    """``conv_transpose1d``, ``2d`` or ``3d`` without groups.

    Attributes:
        dims: Number of spatial dimensions: 1, 2 or 3.
    """

    dims: int

    @property
    def name(self) -> str:
        """``conv-transpose1d``, ``conv-transpose2d`` or ``conv-transpose3d``."""
        return f"conv-transpose{self.dims}d"

    def match(self, node: fx.Node, region: Region) -> Match:
        """See :class:`lora_fx.types.Pattern`."""
        if target_of(node) not in _FUNCTIONS[self.dims]:
            return None
        named = arguments(node, _SIGNATURE)
        found = weight_of(named["weight"], region)
        if found is None or not found.plain:
            return computed(region, node, named["weight"])
        parameter = region.parameter(found.source)
        assert parameter is not None
        if named["groups"] != 1:
            reason = "transposed convolutions with groups have no adapter yet"
            return reject(region, node, found.source, reason)
        return make_site(
            region,
            pattern=self.name,
            family="conv",
            weight=found,
            bias=named["bias"],
            x=named["input"],
            output=node,
            sizes=(parameter.shape[0], parameter.shape[1]),
            layout="in_out",
        )

    def factors(self, site: Site, rank: int) -> Factors:
        """A [r, in, *k], B [out, r, 1, ...]."""
        kernel = site.weight_shape[2:]
        b = (site.out_features, rank, *(1 for _ in kernel))
        return Factors((rank, site.in_features, *kernel), b)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """The base operation's geometry with A, then a 1 x 1 convolution with B."""
        named = arguments(node, _SIGNATURE)
        geometry = [named[key] for key in ("stride", "padding", "output_padding")]
        down = build.call(
            Role.DOWN,
            _FUNCTIONS[self.dims][0],
            build.dropped(named["input"]),
            build.call(Role.DOWN, torch.transpose, build.a, 0, 1),
            None,
            *geometry,
            1,
            named["dilation"],
        )
        return build.call(Role.UP, _POINTWISE[self.dims], down, build.b)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``Σᵣ B[o, r] A[r, i]``, [in, out, *k]."""
        return torch.einsum("or,ri...->io...", b.flatten(1), a)

    def flops(self, site: Site, rank: int) -> int:
        """Twice the elements of both factors, for one input position."""
        return 2 * self.factors(site, rank).numel
