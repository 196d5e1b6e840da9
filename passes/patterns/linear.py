"""Patterns of matrix products with a weight, ``y = x Wᵀ + b``, in all their spellings.

The adapted product is ``y' = x Wᵀ + b + s · (x Aᵀ) Bᵀ``. W is [out, in], or [in, out] if it is stored
transposed (``x @ W``, Conv1D of GPT-2). With the weight on the left, ``y = W x`` and the branch is
``s · B (A x)``. A is [r, in] and B [out, r] in every case, so that ΔW = s · B A.

With a quantized weight the operation is opaque: ``y' = q(x) + s · (x Aᵀ) Bᵀ``, where q is the kernel of the
weight's library (QLoRA, arXiv:2305.14314). The branch does not dequantize the weight.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import BranchBuilder, Factors, Layout, Match, Region, Role, Site
from lora_fx.passes.graph import arguments, known_arguments, target_of
from lora_fx.passes.patterns.sites import (
    computed,
    make_site,
    not_floating,
    reject,
    unknown,
    with_call,
)
from lora_fx.passes.patterns.weights import WeightView, constant_of, weight_of

__all__ = [
    "ARGUMENTS",
    "LinearPattern",
    "MatmulPattern",
    "Product",
    "QuantizedPattern",
    "applied",
    "product_of",
]


_aten = torch.ops.aten
_LINEAR = (F.linear, _aten.linear.default)
_ADDMM = (
    *(torch.addmm, torch.Tensor.addmm, _aten.addmm.default),
    *(torch.baddbmm, torch.Tensor.baddbmm, _aten.baddbmm.default),
)
_MATMUL = (
    *(operator.matmul, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    *(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.mv, torch.Tensor.mv),
    *(torch.sparse.mm, _aten.mm.default, _aten.matmul.default, _aten.bmm.default, _aten.mv.default),
)
_LINEAR_NAMES = "input weight bias=None"
_ADDMM_NAMES = "input|self mat1|batch1 mat2|batch2 * beta=1 alpha=1"
_MATMUL_NAMES = "input|self other|mat2|tensor2|vec"


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix product in a graph: ``x`` times a weight.

    Attributes:
        x: The node of the activation.
        view: The weight, and the view that the product reads.
        layout: Layout of the weight's last two dimensions as stored, as in :class:`lora_fx.ir.site.Site`.
        left: True if the weight is the left operand. Then each column of the activation is an input vector.
        bias: The node added to the product, or None.
        family: ``linear`` for ``F.linear``, ``matmul`` for any other function.
        operand: The node that the operation multiplies with: the view of the weight.
        operand_layout: Layout of the operand: [out, in] (``linear``) or [in, out] (``x @ operand``).
    """

    x: fx.Node
    view: WeightView
    layout: Layout
    left: bool
    bias: object
    family: str
    operand: fx.Node
    operand_layout: Layout


def product_of(node: fx.Node, region: Region) -> Product | Match:
    """Return the matrix product with a weight that a node computes, a refusal, or None for other nodes."""
    target = target_of(node)
    if target in _LINEAR:
        named = known_arguments(node, _LINEAR_NAMES)
        if named is None:
            return unknown(region, node, _LINEAR_NAMES)
        return applied(
            node, region, named["input"], named["weight"], "out_in", named["bias"], "linear"
        )
    if target in _ADDMM:
        named = known_arguments(node, _ADDMM_NAMES)
        if named is None:
            return unknown(region, node, _ADDMM_NAMES)
        left, right, bias = named["mat1"], named["mat2"], named["input"]
    elif target in _MATMUL:
        named = known_arguments(node, _MATMUL_NAMES)
        if named is None:
            return unknown(region, node, _MATMUL_NAMES)
        left, right, bias = named["input"], named["other"], None
    else:
        return None
    product = applied(node, region, left, right, "in_out", bias)
    if product is None:
        product = applied(node, region, right, left, "out_in", bias, left=True)
    if isinstance(product, Product) and any(named.get(k, 1) != 1 for k in ("alpha", "beta")):
        name = getattr(target, "__name__", str(target)).partition(".")[0]
        return reject(region, node, product.view.source, f"{name} with alpha or beta other than 1")
    return product


def applied(
    node: fx.Node,
    region: Region,
    x: Any,
    weight: Any,
    layout: Layout,
    bias: object = None,
    family: str = "matmul",
    *,
    left: bool = False,
) -> Product | Match:
    """Return the product of ``x`` and ``weight`` if ``x`` is an activation and ``weight`` reads a parameter.

    Otherwise return a refusal, or None if the operation applies no weight.
    """
    view = weight_of(weight, region)
    if view is None:
        if not isinstance(weight, fx.Node) or constant_of(x, region) is not None:
            return None
        if region.tensor(weight) is not None:
            return reject(region, node, weight, "its weight is a buffer, not a parameter")
        return computed(region, node, weight)
    if not isinstance(x, fx.Node) or constant_of(x, region) is not None:
        return None
    stored: Layout = layout
    if view.transposed:
        stored = "in_out" if layout == "out_in" else "out_in"
    assert isinstance(weight, fx.Node)
    return Product(x, view, stored, left, bias, family, weight, layout)


class LinearPattern:
    """Pattern of ``F.linear`` and ``aten.linear``, which ``nn.Linear`` and its subclasses call."""

    name = "linear"
    _family = "linear"

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes of A [r, in] and B [out, r]."""
        return Factors((rank, site.in_features), (site.out_features, rank))

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``B A``, transposed for a weight that is stored [in, out]."""
        product = b @ a
        return product if site.layout == "out_in" else product.mT

    def flops(self, site: Site, rank: int) -> int:
        """Return ``2 r (in + out)``."""
        return 2 * rank * (site.in_features + site.out_features)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write the two products of the branch."""
        seen = product_of(node, region)
        assert isinstance(seen, Product)
        if seen.left:
            x, b = build.dropped(seen.x), build.b
            return build.call(
                Role.UP, torch.matmul, b, build.call(Role.DOWN, torch.matmul, build.a, x)
            )
        return build.low_rank(seen.x, with_bias=seen.family == "linear")

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
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
        return with_call(site, left=True, axes=(-2,)) if seen.left else site


class MatmulPattern(LinearPattern):
    """Pattern of ``x @ W``, ``matmul``, ``mm`` and ``addmm``, with the weight as stored or transposed."""

    name = "matmul"
    _family = "matmul"


ARGUMENTS = "x weight bias=None compute_dtype=None threshold=0.0 training=False layout='out_in'"
"""Parameters of :func:`lora_fx.formats.weights.quantized_linear`."""


class QuantizedPattern(LinearPattern):
    """Pattern of :func:`lora_fx.formats.weights.quantized_linear`, a product with a quantized weight."""

    name = "quantized"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
        if target_of(node) is not quantized_linear:
            return None
        named = known_arguments(node, ARGUMENTS)
        if named is None:
            return unknown(region, node, ARGUMENTS)
        weight: Any = named["weight"]
        layout: Layout = named["layout"]
        parameter = region.parameter(weight)
        quantization = quantization_of(parameter)
        if quantization is None:
            return reject(region, node, weight, "its quantized weight is not initialized")
        out_features, in_features = quantization.shape
        site = make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=weight,
            bias=named["bias"],
            x=named["x"],
            output=node,
            sizes=(in_features, out_features),
            layout=layout,
        )
        shape = quantization.shape if layout == "out_in" else quantization.shape[::-1]
        return dataclasses.replace(site, weight_shape=shape, quantized=quantization)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write the two products of the branch."""
        return build.low_rank(arguments(node, ARGUMENTS)["x"])
