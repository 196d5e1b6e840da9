"""Patterns of weights with a matrix for each expert, ``y = x W[e]ᵀ``, with a low-rank branch for each.

A is [E, r, in] and B is [E, out, r], so that ΔW[e] = s · B[e] A[e]. Both are read in the same way as the
weight: for one expert, for the expert of each row, for all at once, or for rows sorted by expert. ΔW is
never built.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from lora_fx import torch_private
from lora_fx.formats import quantization_of
from lora_fx.ir import BranchBuilder, Factors, Match, Region, Role, Site
from lora_fx.passes.graph import arguments, known_arguments, target_of
from lora_fx.passes.patterns.linear import Product, applied, product_of
from lora_fx.passes.patterns.sites import make_site, not_floating, reject, unknown
from lora_fx.passes.patterns.weights import WeightView
from lora_fx.runtime import experts

__all__ = ["ExpertsPattern", "GroupedPattern"]

_GROUPED = (experts.grouped_mm, *torch_private.GROUPED_MM_FUNCTIONS)
_GROUPED_ARGUMENTS = "x|mat_a|input|self weight|mat_b|mat2 offs|ends bias"
_GROUPED_NAMES = ("transformers.grouped_mm_fallback.default", "transformers.grouped_mm_fallback")


class ExpertsPattern:
    """Pattern of ``matmul``, ``bmm`` and ``linear`` with a stack of matrices or one of the matrices."""

    name = "experts"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
        seen = self._see(node, region)
        if not isinstance(seen, Product):
            return seen
        if len(seen.view.shape) != 3:
            return None
        view = seen.view
        if refused := not_floating(region, node, view.source):
            return refused
        out_features, in_features = view.shape[1:]
        if seen.layout == "in_out":
            in_features, out_features = out_features, in_features
        site = make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=view,
            bias=seen.bias,
            x=seen.x,
            output=node,
            sizes=(in_features, out_features),
            layout=seen.layout,
        )
        stored = quantization_of(region.parameter(view.source))
        return dataclasses.replace(site, experts=view.shape[0], quantized=stored)

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes of A [E, r, in] and B [E, out, r]."""
        count = site.experts or 1
        return Factors(
            (count, rank, site.in_features), (count, site.out_features, rank), stacked=True
        )

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write two products, with the factors indexed in the same way as the weight."""
        seen = self._see(node, region)
        assert isinstance(seen, Product)
        x = build.dropped(seen.x)
        if isinstance(seen.view.index, int):
            return _products(seen, x, build)
        # If x is a vector, the first product has a row for each expert. The second would read it as a matrix.
        matrix = build.call(Role.DOWN, experts.as_matrix, x, seen.left)
        up = _products(seen, matrix, build)
        return build.call(Role.UP, experts.as_before, up, seen.x, seen.left)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``B[e] A[e]`` for each expert."""
        product = b @ a
        return product if site.layout == "out_in" else product.mT

    def flops(self, site: Site, rank: int) -> int:
        """Return ``2 r (in + out)``, for one row of one expert."""
        return 2 * rank * (site.in_features + site.out_features)

    def _see(self, node: fx.Node, region: Region) -> Product | Match:
        return product_of(node, region)


class GroupedPattern(ExpertsPattern):
    """Pattern of a grouped product, with rows sorted by expert and the end index of each expert's rows."""

    name = "grouped-mm"

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write two grouped products."""
        seen = self._see(node, region)
        assert isinstance(seen, Product)
        ends = arguments(node, _GROUPED_ARGUMENTS)["offs"]
        if ends is None:
            # Without offsets, it is a batched product with a batch of rows for each expert.
            return super().branch(site, node, region, build)
        down = build.call(Role.DOWN, experts.grouped_linear, build.dropped(seen.x), build.a, ends)
        return build.call(Role.UP, experts.grouped_linear, down, build.b, ends)

    def _see(self, node: fx.Node, region: Region) -> Product | Match:
        target = target_of(node)
        if target not in _GROUPED and str(target) not in _GROUPED_NAMES:
            return None
        named = known_arguments(node, _GROUPED_ARGUMENTS)
        if named is None:
            return unknown(region, node, _GROUPED_ARGUMENTS)
        product = applied(node, region, named["x"], named["weight"], "in_out")
        if isinstance(product, Product) and (named["bias"] is not None or product.view.indexed):
            return reject(
                region, node, product.view.source, "a grouped product with a bias of its own"
            )
        return product


def _products(seen: Product, x: fx.Node, build: BranchBuilder) -> fx.Node:
    if seen.left:
        down = build.call(Role.DOWN, torch.matmul, _read(build, "a", seen.view), x)
        return build.call(Role.UP, torch.matmul, _read(build, "b", seen.view), down)
    down = build.call(Role.DOWN, torch.matmul, x, _transposed(build, "a", seen.view))
    return build.call(Role.UP, torch.matmul, down, _transposed(build, "b", seen.view))


def _read(build: BranchBuilder, letter: str, view: WeightView) -> fx.Node:
    """Return a factor, indexed in the same way as the weight."""
    if not view.indexed:
        return build.a if letter == "a" else build.b
    if isinstance(view.index, int):
        return build.item(letter, view.index)
    factor = build.a if letter == "a" else build.b
    return build.call(Role.FACTOR, operator.getitem, factor, view.index)


def _transposed(build: BranchBuilder, letter: str, view: WeightView) -> fx.Node:
    return build.call(Role.FACTOR, torch.transpose, _read(build, letter, view), -1, -2)
