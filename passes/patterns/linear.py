"""Matrix products with a weight: ``y = x Wᵀ + b`` in all the ways in which people write it.

``y' = x Wᵀ + b + s · (x Aᵀ) Bᵀ``, with W [out, in] or, where it is stored the other way round
(``x @ W``, Conv1D of GPT-2), [in, out]. With the weight on the left, ``y = W x`` and the branch is
``s · B (A x)``. A is [r, in] and B [out, r] in every case, so that ΔW = s · B A.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.passes._fx import arguments, target_of
from lora_fx.passes._weights import constant_of, weight_of
from lora_fx.passes.patterns.sites import computed, make_site, reject
from lora_fx.types import BranchBuilder, Factors, Layout, Match, Region, Role, Site

__all__ = ["LinearPattern", "MatmulPattern"]

_LINEAR = (F.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
_ADDMM = (torch.addmm, torch.Tensor.addmm, torch.ops.aten.addmm.default)
_MATMUL = (
    operator.matmul,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
    torch.ops.aten.mm.default,
    torch.ops.aten.matmul.default,
)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix product seen in a graph: ``x`` times the weight that ``weight`` reads."""

    x: fx.Node
    weight: fx.Node
    layout: Layout
    left: bool
    bias: object
    rows: tuple[int, int] | None


class _Linear:
    """The algebra that the patterns of this file share."""

    name = "linear"

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
        seen = self._see(node, region)
        assert isinstance(seen, _Product)
        x = build.dropped(seen.x)
        if seen.left:
            return build.call(
                Role.UP, torch.matmul, build.b, build.call(Role.DOWN, torch.matmul, build.a, x)
            )
        return build.call(Role.UP, F.linear, build.call(Role.DOWN, F.linear, x, build.a), build.b)

    def match(self, node: fx.Node, region: Region) -> Match:
        """See :class:`lora_fx.types.Pattern`."""
        seen = self._see(node, region)
        if not isinstance(seen, _Product):
            return seen
        parameter = region.parameter(seen.weight)
        assert parameter is not None
        if parameter.dim() != 2:
            return reject(
                region,
                node,
                seen.weight,
                f"its weight has {parameter.dim()} dimensions; a linear operation has 2",
            )
        if not parameter.dtype.is_floating_point:
            return reject(
                region, node, seen.weight, f"its weight is {parameter.dtype}, not floating point"
            )
        if seen.rows is not None and seen.layout == "in_out":
            return reject(
                region,
                node,
                seen.weight,
                "some of its inputs' weights are taken out of it (a slice)",
            )
        out_features, in_features = parameter.shape
        if seen.rows is not None:
            out_features = seen.rows[1] - seen.rows[0]
        if seen.layout == "in_out":
            in_features, out_features = out_features, in_features
        return make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=seen.weight,
            bias=seen.bias,
            x=seen.x,
            output=node,
            sizes=(in_features, out_features),
            layout=seen.layout,
            rows=seen.rows,
        )

    def _see(self, node: fx.Node, region: Region) -> _Product | Match:
        raise NotImplementedError


class LinearPattern(_Linear):
    """``F.linear`` and ``aten.linear``: what ``nn.Linear`` and affine subclasses come down to."""

    name = "linear"

    def _see(self, node: fx.Node, region: Region) -> _Product | Match:
        if target_of(node) not in _LINEAR:
            return None
        named = arguments(node, "input weight bias=None")
        return _product(
            node, region, named["input"], named["weight"], "out_in", False, named["bias"]
        )


class MatmulPattern(_Linear):
    """``x @ W``, ``matmul``, ``mm``, ``addmm``: the weight as it is stored or transposed."""

    name = "matmul"

    def _see(self, node: fx.Node, region: Region) -> _Product | Match:
        target = target_of(node)
        if target in _ADDMM:
            named = arguments(node, "input mat1 mat2")
            left, right, bias = named["mat1"], named["mat2"], named["input"]
        elif target in _MATMUL:
            named = arguments(node, "input other")
            # `mm` calls its second operand `mat2`.
            left, right, bias = named["input"], named["other"] or node.kwargs.get("mat2"), None
        else:
            return None
        found = _product(node, region, left, right, "in_out", False, bias)
        if found is None:
            found = _product(node, region, right, left, "out_in", True, bias)
        if isinstance(found, _Product) and any(
            node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")
        ):
            return reject(region, node, found.weight, "addmm with alpha or beta other than 1")
        return found


def _product(
    node: fx.Node, region: Region, x: Any, weight: Any, layout: Layout, left: bool, bias: object
) -> _Product | Match:
    """``x`` times ``weight`` if one is an activation and the other a parameter."""
    found = weight_of(weight, region)
    if found is None:
        if not isinstance(weight, fx.Node) or constant_of(x, region) is not None:
            return None
        if region.tensor(weight) is not None:
            return reject(region, node, weight, "its weight is a buffer, not a parameter")
        return computed(region, node, weight)
    if not isinstance(x, fx.Node) or constant_of(x, region) is not None:
        return None
    if found.transposed:
        layout = "in_out" if layout == "out_in" else "out_in"
    return _Product(x, found.source, layout, left, bias, found.rows)
