"""Matrix products with a weight, in all the ways in which people write them: seen, not yet judged."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import Layout, Match, Region
from lora_fx.passes.graph import known_arguments, target_of
from lora_fx.passes.patterns.sites import computed, reject, unknown
from lora_fx.passes.patterns.weights import WeightView, constant_of, weight_of

__all__ = ["Product", "applied", "product_of"]

_aten = torch.ops.aten
_LINEAR = (F.linear, torch._C._nn.linear, _aten.linear.default)
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
    """A matrix product in a graph: ``x`` times a weight.

    Attributes:
        x: The activation.
        view: The weight, and how it is read.
        layout: How its last two dimensions are stored, as :class:`lora_fx.ir.site.Site` has it.
        left: Whether the weight is the left operand, so that the activation's columns are its inputs.
        bias: What is added to the product, or None.
        family: ``linear`` where a bias is the operation's own, ``matmul`` for a bare product.
        operand: The node that the operation multiplies with: the weight as it is read.
        operand_layout: How that lies: [out, in] (``linear``) or [in, out] (``x @ operand``).
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
    """The matrix product with a weight that a node is; a refusal, or None if it is something else."""
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
    found = applied(node, region, left, right, "in_out", bias)
    if found is None:
        found = applied(node, region, right, left, "out_in", bias, left=True)
    if isinstance(found, Product) and any(named.get(k, 1) != 1 for k in ("alpha", "beta")):
        what = getattr(target, "__name__", str(target)).partition(".")[0]
        return reject(region, node, found.view.source, f"{what} with alpha or beta other than 1")
    return found


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
    """``x`` times ``weight`` if one is an activation and the other a parameter."""
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
