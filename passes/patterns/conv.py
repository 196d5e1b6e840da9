"""Patterns of convolutions, ``y' = conv(x, W) + s · conv₁(conv(x, A), B)``, and transposed convolutions.

A [r, in, *k] has the base operation's stride, padding and dilation, and B [out, r, 1, ...] is a 1 x 1
convolution. The weight of a transposed convolution is stored [in, out, *k], and A is read with its first
two dimensions swapped. So ΔW[i, o] = s · Σᵣ B[o, r] A[r, i], kernel by kernel.

The weight of a transposed convolution with g groups is [in, out/g, *k]. Both factors are grouped as for other
convolutions: A [r, in/g, *k], B [out, r/g, 1, ...]. So ΔW has the shape of W and can be merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import BranchBuilder, Factors, Layout, Match, Region, Role, Site
from lora_fx.passes.graph import arguments, known_arguments, target_of
from lora_fx.passes.patterns.sites import computed, make_site, reject, unknown, with_call
from lora_fx.passes.patterns.weights import weight_of

__all__ = ["ConvPattern", "ConvTransposePattern"]


_aten = torch.ops.aten
_FUNCTIONS: dict[int, tuple[Any, ...]] = {
    1: (F.conv1d, _aten.conv1d.default, _aten.conv1d.padding),
    2: (F.conv2d, _aten.conv2d.default, _aten.conv2d.padding),
    3: (F.conv3d, _aten.conv3d.default, _aten.conv3d.padding),
}
_SIGNATURE = "input weight bias=None stride=1 padding=0 dilation=1 groups=1"


_TRANSPOSED: dict[int, tuple[Any, ...]] = {
    1: (F.conv_transpose1d, _aten.conv_transpose1d.default),
    2: (F.conv_transpose2d, _aten.conv_transpose2d.input),
    3: (F.conv_transpose3d, _aten.conv_transpose3d.input),
}
_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED_SIGNATURE = (
    "input weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1"
)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """Base class of the patterns of convolutions and transposed convolutions.

    Attributes:
        dims: Number of spatial dimensions: 1, 2 or 3.
    """

    called: ClassVar[str]
    functions: ClassVar[Mapping[int, tuple[Any, ...]]]
    signature: ClassVar[str]
    layout: ClassVar[Layout]
    dims: int

    @property
    def name(self) -> str:
        """Return the name: ``conv1d``, ``conv-transpose1d`` and so on."""
        return f"{self.called}{self.dims}d"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
        if target_of(node) not in self.functions[self.dims]:
            return None
        named = known_arguments(node, self.signature)
        if named is None:
            return unknown(region, node, self.signature)
        view = weight_of(named["weight"], region)
        if view is None or not view.plain:
            return computed(region, node, named["weight"])
        parameter = region.parameter(view.source)
        assert parameter is not None
        if parameter.dim() != self.dims + 2:
            reason = f"its weight has {parameter.dim()} dimensions; that of {self.name} has {self.dims + 2}"
            return reject(region, node, view.source, reason)
        groups = named["groups"]
        if not isinstance(groups, int):
            return reject(region, node, view.source, "its number of groups depends on the input")
        first, second = parameter.shape[:2]
        forward = self.layout == "out_in"
        site = make_site(
            region,
            pattern=self.name,
            family="conv",
            weight=view,
            bias=named["bias"],
            x=named["input"],
            output=node,
            sizes=(second * groups, first) if forward else (first, second * groups),
            layout=self.layout,
        )
        return dataclasses.replace(with_call(site, axes=(-1 - self.dims,)), groups=groups)

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes of A [r, in/g, *k] and B [out, r/g, 1, ...]."""
        kernel = site.weight_shape[2:]
        a = (rank, site.in_features // site.groups, *kernel)
        return Factors(a, (site.out_features, rank // site.groups, *(1 for _ in kernel)))

    def flops(self, site: Site, rank: int) -> int:
        """Return the FLOPs of a branch for one output position: twice the size of both factors."""
        return 2 * self.factors(site, rank).numel


class ConvPattern(_Convolution):
    """Pattern of ``conv1d``, ``conv2d`` or ``conv3d``, with groups, dilation and any padding."""

    called = "conv"
    functions = _FUNCTIONS
    signature = _SIGNATURE
    layout = "out_in"

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write a convolution with A and the base geometry, then a 1 x 1 convolution with B."""
        named = arguments(node, _SIGNATURE)
        conv = _FUNCTIONS[self.dims][0]
        geometry = (named["stride"], named["padding"], named["dilation"], site.groups)
        down = build.call(Role.DOWN, conv, build.dropped(named["input"]), build.a, None, *geometry)
        return build.call(Role.UP, conv, down, build.b, build.bias, 1, 0, 1, site.groups)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``B A`` group by group, in W's shape."""
        g = site.groups
        grouped_a = a.reshape(g, a.shape[0] // g, -1)
        grouped_b = b.reshape(g, b.shape[0] // g, -1)
        return (grouped_b @ grouped_a).reshape(-1, *site.weight_shape[1:])


class ConvTransposePattern(_Convolution):
    """Pattern of ``conv_transpose1d``, ``2d`` or ``3d``, with groups, dilation and output padding."""

    called = "conv-transpose"
    functions = _TRANSPOSED
    signature = _TRANSPOSED_SIGNATURE
    layout = "in_out"

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write a transposed convolution with A and the base geometry, then a 1 x 1 convolution with B."""
        named = arguments(node, _TRANSPOSED_SIGNATURE)
        geometry = [named[key] for key in ("stride", "padding", "output_padding")]
        down = build.call(
            Role.DOWN,
            _TRANSPOSED[self.dims][0],
            build.dropped(named["input"]),
            _turned(site, build),
            None,
            *geometry,
            site.groups,
            named["dilation"],
        )
        pointwise = _POINTWISE[self.dims]
        if site.groups == 1:
            return build.call(Role.UP, pointwise, down, build.b, build.bias)
        return build.call(Role.UP, pointwise, down, build.b, build.bias, 1, 0, 1, site.groups)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``Σᵣ B[o, r] A[r, i]``, group by group, [in, out/g, *k]."""
        grouped_a = a.reshape(site.groups, -1, *a.shape[1:])
        grouped_b = b.reshape(site.groups, -1, b.shape[1])
        return torch.einsum("gor,gri...->gio...", grouped_b, grouped_a).flatten(0, 1)


def _turned(site: Site, build: BranchBuilder) -> fx.Node:
    """Add nodes that bring A into the layout of a transposed convolution, [in, r/g, *k]."""
    if site.groups == 1:
        return build.call(Role.DOWN, torch.transpose, build.a, 0, 1)
    grouped = build.call(Role.DOWN, torch.unflatten, build.a, 0, (site.groups, -1))
    turned = build.call(Role.DOWN, torch.transpose, grouped, 1, 2)
    return build.call(Role.DOWN, torch.flatten, turned, 0, 1)
