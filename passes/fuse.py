"""Makes one node of a linear operation and its branch: :func:`lora_fx.fused.lora_linear`.

It comes after the branches and reads them by their tags. What it does not know stays as it is: variants,
branches behind those of another adapter, weights on the left of a product, and whatever a pattern of one's
own has written.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.fused import lora_linear
from lora_fx.passes._edit import edit_graphs
from lora_fx.passes._fx import target_of
from lora_fx.passes._region import copy_graph
from lora_fx.passes._weights import weight_of
from lora_fx.passes.patterns.product import Product, product_of
from lora_fx.types import META_KEY, Capture, PassResult, Region, Role, Tag

__all__ = ["Fuse"]

_LINEAR = (F.linear, torch._C._nn.linear)


@dataclasses.dataclass(frozen=True)
class Fuse:
    """The pass."""

    name: ClassVar[str] = "fuse"

    def __call__(self, capture: Capture) -> PassResult:
        """Edits every graph that has branches."""
        return edit_graphs(capture, _fused)


def _fused(region: Region) -> fx.Graph | None:
    """The graph with every branch fused that can be; None if there is none."""
    if not any(_tag(node) for node in region.graph.nodes):
        return None
    graph = copy_graph(region.graph)
    copied = dataclasses.replace(region, graph=graph)
    found = [one for node in graph.nodes if (one := _read(node, copied)) is not None]
    for one in found:
        _replace(graph, one)
    graph.lint()
    return graph if found else None


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A branch that can be fused with its operation.

    Attributes:
        product: The operation.
        base: Its node.
        total: The sum of both.
        inner: The nodes between them: not those that read the factors.
        a: The node that reads A.
        b: The node that reads B.
        scale: The factor of the branch.
        dropout: Probability, and the node that says whether there is any now.
        rows: Which outputs the branch is added to; None for all.
    """

    product: Product
    base: fx.Node
    total: fx.Node
    inner: tuple[fx.Node, ...]
    a: fx.Node
    b: fx.Node
    scale: float
    dropout: tuple[float, Any] = (0.0, False)
    rows: tuple[int, int] | None = None


def _read(total: fx.Node, region: Region) -> _Branch | None:
    """The branch that a node adds to a linear operation; None if it is something else."""
    if _role(total) is not Role.ADD or total.target is not operator.add:
        return None
    base, branch = total.args
    if not isinstance(base, fx.Node) or _role(base) is not Role.BASE:
        return None
    product = product_of(base, region)
    if not isinstance(product, Product) or not _fits(product, region):
        return None
    inner: list[fx.Node] = []

    def step(node: Any, role: Role, *targets: Any) -> tuple[Any, ...] | None:
        """The arguments of a node of the branch; None if it is another one."""
        if not isinstance(node, fx.Node) or _role(node) is not role or node.kwargs:
            return None
        if target_of(node) not in targets:
            return None
        inner.append(node)
        return node.args

    padded = step(branch, Role.PAD, F.pad)
    scaled = step(padded[0] if padded else branch, Role.SCALE, operator.mul)
    up = step(scaled[0], Role.UP, *_LINEAR) if scaled else None
    down = step(up[0], Role.DOWN, *_LINEAR) if up and len(up) == 2 else None
    if scaled is None or up is None or down is None or len(down) != 2:
        return None
    dropped = step(down[0], Role.DROPOUT, F.dropout)
    if (dropped[0] if dropped else down[0]) is not product.x:
        return None
    if not _only_inside(base, (*inner, total)):
        return None
    return _Branch(
        product,
        base,
        total,
        tuple(inner),
        _uncast(down[1]),
        _uncast(up[1]),
        scaled[1],
        (dropped[1], dropped[2]) if dropped else (0.0, False),
        _rows(padded[1], product) if padded else None,
    )


def _fits(product: Product, region: Region) -> bool:
    """Whether :func:`lora_linear` computes what the operation does."""
    view, weight = product.view, region.parameter(product.view.source)
    if product.left or view.indexed or len(view.shape) != 2 or weight is None:
        return False
    # A quantised weight has a product of its own.
    if type(weight.data) is not torch.Tensor:
        return False
    bias = product.bias
    if bias is None:
        return True
    # What addmm adds may be anything.
    source = weight_of(bias, region)
    return source is not None and len(source.shape) == 1


def _rows(padding: Any, product: Product) -> tuple[int, int]:
    """Which outputs are left where others are padded with zeros."""
    axis = 0 if product.layout == "out_in" else 1
    return padding[0], product.view.shape[axis] - padding[1]


def _only_inside(base: fx.Node, nodes: tuple[fx.Node, ...]) -> bool:
    """Whether nothing else needs the output without the branch."""
    return all(user in nodes or _role(user) is Role.CAST for user in base.users)


def _uncast(factor: fx.Node) -> fx.Node:
    """The factor in its own dtype: the function casts by itself."""
    if _role(factor) is Role.CAST and factor.target == "type_as":
        (factor, _) = factor.args  # type: ignore[assignment]
    return factor


def _replace(graph: fx.Graph, branch: _Branch) -> None:
    tag = dataclasses.replace(branch.total.meta[META_KEY], role=Role.FUSED)
    product = branch.product
    with graph.inserting_before(branch.total):
        weight = product.operand
        if product.operand_layout == "in_out":
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = tag
        given: tuple[Any, ...] = (
            product.x,
            weight,
            product.bias,
            branch.a,
            branch.b,
            branch.scale,
        )
        options: dict[str, Any] = {}
        if branch.dropout[0]:
            options = {"dropout": branch.dropout[0], "training": branch.dropout[1]}
        if branch.rows is not None:
            options["rows"] = branch.rows
        node = graph.call_function(lora_linear, given, options)
    node.meta[META_KEY] = tag
    branch.total.replace_all_uses_with(node)
    for old in (branch.total, *branch.inner):
        graph.erase_node(old)
    for user in tuple(branch.base.users):
        # A cast to the dtype of the output: of this branch's factors, or of another adapter's.
        if user.users:
            user.replace_input_with(branch.base, node)
        else:
            graph.erase_node(user)
    graph.erase_node(branch.base)


def _role(node: object) -> Role | None:
    tag = node.meta.get(META_KEY) if isinstance(node, fx.Node) else None
    return tag.role if isinstance(tag, Tag) else None


def _tag(node: fx.Node) -> Tag | None:
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) and tag.adapter else None
