"""Matrix products with a weight: ``y = x Wᵀ + b``.

``y' = x Wᵀ + b + s · (x Aᵀ) Bᵀ``, with W [out, in] or, where it is stored the other way round
(``x @ W``, Conv1D of GPT-2), [in, out]. With the weight on the left, ``y = W x`` and the branch is
``s · B (A x)``. A is [r, in] and B [out, r] in every case, so that ΔW = s · B A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import BranchBuilder, Factors, Match, Region, Role, Site
from lora_fx.passes.patterns.product import Product, product_of
from lora_fx.passes.patterns.sites import make_site, not_floating, reject

__all__ = ["LinearPattern", "MatmulPattern"]


class LinearPattern:
    """``F.linear`` and ``aten.linear``: what ``nn.Linear`` and affine subclasses come down to."""

    name = "linear"
    _family = "linear"

    def factors(self, site: Site, rank: int) -> Factors:
        """A [r, in], B [out, r]."""
        return Factors((rank, site.in_features), (site.out_features, rank))

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``B A``, transposed for a weight that is stored [in, out]."""
        product = b @ a
        return product if site.layout == "out_in" else product.mT

    def flops(self, site: Site, rank: int) -> int:
        """``2 r (in + out)``."""
        return 2 * rank * (site.in_features + site.out_features)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Two products beside the base one."""
        seen = product_of(node, region)
        assert isinstance(seen, Product)
        x = build.dropped(seen.x)
        if seen.left:
            return build.call(
                Role.UP, torch.matmul, build.b, build.call(Role.DOWN, torch.matmul, build.a, x)
            )
        down = build.call(Role.DOWN, F.linear, x, build.a)
        if seen.family == "linear" and build.bias is not None:
            return build.call(Role.UP, F.linear, down, build.b, build.bias)
        return build.call(Role.UP, F.linear, down, build.b)

    def match(self, node: fx.Node, region: Region) -> Match:
        """See :class:`lora_fx.ir.site.Pattern`."""
        seen = product_of(node, region)
        if not isinstance(seen, Product):
            return seen
        if seen.family != self._family:
            return None
        view, source = seen.view, seen.view.source
        if len(view.shape) != 2:
            reason = f"its weight has {len(view.shape)} dimensions; a linear operation has 2"
            return reject(region, node, source, reason)
        if refused := not_floating(region, node, source):
            return refused
        if view.rows is not None and seen.layout == "in_out":
            reason = "some of its inputs' weights are taken out of it (a slice)"
            return reject(region, node, source, reason)
        out_features, in_features = view.shape
        if view.rows is not None:
            out_features = view.rows[1] - view.rows[0]
        if seen.layout == "in_out":
            in_features, out_features = out_features, in_features
        return make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=view,
            bias=seen.bias,
            x=seen.x,
            output=node,
            sizes=(in_features, out_features),
            layout=seen.layout,
            left=seen.left,
        )


class MatmulPattern(LinearPattern):
    """``x @ W``, ``matmul``, ``mm``, ``addmm``: the weight as it is stored or transposed."""

    name = "matmul"
    _family = "matmul"
