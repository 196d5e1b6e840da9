"""Makes one node of a linear operation and its branch.

It is the fused function of the adapter kind, which reads its branch backwards from the end
(:meth:`lora_fx.kinds.AdapterKind.fused`), or over a quantized weight
:func:`lora_fx.runtime.fused_quantized.quantized_lora_linear`. It comes after the branches;
:mod:`lora_fx.passes.optimize.fuse` says which it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import (
    META_KEY,
    BranchEnds,
    Capture,
    FusedBranch,
    Pass,
    PassResult,
    Region,
    Role,
    Tag,
)
from lora_fx.kinds import kinds
from lora_fx.passes.graph import arguments, copy_graph, edit_graphs, target_of
from lora_fx.passes.patterns import ARGUMENTS, Product, product_of, weight_of
from lora_fx.runtime import (
    cast_like,
    quantized_lora_linear,
)

__all__ = [
    "Base",
    "Fusable",
    "Fuse",
    "fusable",
    "role_of",
]


_LINEAR = (F.linear, torch._C._nn.linear)


@dataclasses.dataclass(frozen=True)
class Base:
    """A linear operation that a fused function can compute.

    Attributes:
        x: The node that it reads.
        weight: The node of its weight, as it is multiplied with.
        bias: The node of the bias, or None.
        turned: Whether the weight is [in, out].
        outputs: How many features it gives.
        kernel: How a product with a quantized weight is computed: arguments of
            :func:`lora_fx.runtime.fused_quantized.quantized_lora_linear`. None for any other.
    """

    x: fx.Node
    weight: fx.Node
    bias: Any
    turned: bool
    outputs: int
    kernel: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Fusable:
    """A branch that can be fused with its operation.

    Attributes:
        operation: The operation.
        base: Its node.
        total: The sum of both.
        inner: The nodes between them: not those that read the factors.
        branch: What the kind has read.
        a: The node that reads A.
        rows: Which outputs the branch is added to; None for all.
    """

    operation: Base
    base: fx.Node
    total: fx.Node
    inner: tuple[fx.Node, ...]
    branch: FusedBranch
    a: fx.Node
    rows: tuple[int, int] | None = None


def role_of(node: object) -> Role | None:
    """What a node does for an adapter; None if nothing, or no node."""
    tag = node.meta.get(META_KEY) if isinstance(node, fx.Node) else None
    return tag.role if isinstance(tag, Tag) else None


def fusable(total: fx.Node, region: Region) -> Fusable | None:
    """The branch that a node adds to a linear operation; None if it is something else."""
    if role_of(total) is not Role.ADD:
        return None
    base = total.args[0]
    if not isinstance(base, fx.Node) or role_of(base) is not Role.BASE:
        return None
    for kind in kinds():
        if not any(total.target is ending for ending in kind.endings):
            continue
        operation = _quantized(base, region) or _multiplied(base, region)
        if operation is None:
            return None
        chain = _Chain(operation)
        branch = kind.fused(total, chain)
        if branch is not None and _only_inside(base, (*chain.inner, total)):
            rows = None if branch.padding is None else _rows(branch.padding, operation)
            a = _uncast(branch.ends.a)
            return Fusable(operation, base, total, chain.inner, branch, a, rows)
    return None


class _Chain:
    """Steps along a branch from its end, and the nodes that were passed."""

    def __init__(self, operation: Base) -> None:
        self.passed: dict[fx.Node, None] = {}
        self._operation = operation

    @property
    def bias(self) -> Any:
        """What the operation adds; None for nothing."""
        return self._operation.bias

    @property
    def quantized(self) -> bool:
        """Whether it is a product with a quantized weight."""
        return self._operation.kernel is not None

    def step(self, node: Any, role: Role, *targets: Any) -> tuple[Any, ...]:
        """The arguments of a node of the branch; empty if it is another one."""
        if not isinstance(node, fx.Node) or role_of(node) is not role or node.kwargs:
            return ()
        if target_of(node) not in targets:
            return ()
        self.passed[node] = None
        return node.args

    def skip(self, node: Any, role: Role, *targets: Any) -> Any:
        """The first argument of a node where it is one of these, otherwise the node itself."""
        args = self.step(node, role, *targets)
        return args[0] if args else node

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        """Readers before what they read: in the order in which nodes can be erased."""
        return tuple(sorted(self.passed, reverse=True))

    def is_call(self, node: Any, role: Role, target: Any) -> bool:
        """Whether a node calls a function, in a role."""
        return role_of(node) is role and target_of(node) is target

    def uncast(self, factor: fx.Node) -> fx.Node:
        """A factor in its own dtype."""
        return _uncast(factor)

    def past_cast(self, factor: fx.Node) -> fx.Node:
        """As :meth:`uncast`, of what is between: the cast goes away with it."""
        uncast = _uncast(factor)
        if uncast is not factor:
            self.passed[factor] = None
        return uncast

    def ends(self, up: Any, operands: int) -> BranchEnds | None:
        """``linear(linear(drop(x), A), B)``, and what the outer one adds if it has three operands."""
        outer = self.step(up, Role.UP, *_LINEAR)
        inner = self.step(outer[0], Role.DOWN, *_LINEAR) if len(outer) == operands else ()
        if len(inner) != 2:
            return None
        dropped = self.step(inner[0], Role.DROPOUT, F.dropout)
        if (dropped[0] if dropped else inner[0]) is not self._operation.x:
            return None
        dropout = (dropped[1], dropped[2]) if dropped else (0.0, False)
        return BranchEnds(inner[1], outer[1], outer[2] if operands == 3 else None, dropout)


def _quantized(node: fx.Node, region: Region) -> Base | None:
    """A product with a quantized weight."""
    if target_of(node) is not quantized_linear:
        return None
    named: dict[str, Any] = arguments(node, ARGUMENTS)
    found = quantization_of(region.parameter(named["weight"]))
    if found is None:
        return None
    names = {"compute_dtype": None, "threshold": None, "training": "base_training"}
    # What is as by default is not written.
    kernel = {ours or name: named[name] for name, ours in names.items() if named[name]}
    given = (named["x"], named["weight"], named["bias"])
    return Base(*given, turned=False, outputs=found.shape[0], kernel=kernel)


def _multiplied(node: fx.Node, region: Region) -> Base | None:
    """A matrix product with a weight of numbers."""
    product = product_of(node, region)
    if not isinstance(product, Product) or not _fits(product, region):
        return None
    outputs = product.view.shape[0 if product.layout == "out_in" else 1]
    turned = product.operand_layout == "in_out"
    return Base(product.x, product.operand, product.bias, turned, outputs)


def _fits(product: Product, region: Region) -> bool:
    """Whether the fused functions compute what the operation does."""
    view, weight = product.view, region.parameter(product.view.source)
    if product.left or view.indexed or len(view.shape) != 2 or weight is None:
        return False
    # A quantized weight has a product of its own.
    if type(weight.data) is not torch.Tensor:
        return False
    bias = product.bias
    if bias is None:
        return True
    # What addmm adds may be anything.
    source = weight_of(bias, region)
    return source is not None and len(source.shape) == 1


def _rows(padding: Sequence[int], operation: Base) -> tuple[int, int]:
    """Which outputs are left where others are padded with zeros."""
    return padding[0], operation.outputs - padding[1]


def _only_inside(base: fx.Node, nodes: tuple[fx.Node, ...]) -> bool:
    """Whether nothing else needs the output without the branch."""
    return all(user in nodes or role_of(user) is Role.CAST for user in base.users)


def _uncast(factor: fx.Node) -> fx.Node:
    """The factor in its own dtype: the function casts by itself."""
    if role_of(factor) is Role.CAST and target_of(factor) is cast_like:
        (factor, _) = factor.args  # type: ignore[assignment]
    return factor


@dataclasses.dataclass(frozen=True)
class Fuse(Pass):
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
    fused = False
    # One after the other, as values flow: what one operation gives may be what the next one reads.
    for node in list(graph.nodes):
        found = fusable(node, copied)
        if found is not None:
            _replace(graph, found)
            fused = True
    graph.lint()
    return graph if fused else None


def _replace(graph: fx.Graph, found: Fusable) -> None:
    tag = dataclasses.replace(found.total.meta[META_KEY], role=Role.FUSED)
    base, branch = found.operation, found.branch
    with graph.inserting_before(found.total):
        weight = base.weight
        if base.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = tag
        given: tuple[Any, ...] = (
            base.x,
            weight,
            base.bias,
            found.a,
            branch.b,
            branch.scale,
            *branch.more,
        )
        function: Any = branch.function
        options: dict[str, Any] = {}
        if branch.ends.dropout[0]:
            options = {"dropout": branch.ends.dropout[0], "training": branch.ends.dropout[1]}
        if found.rows is not None:
            options["rows"] = found.rows
        if base.kernel is not None:
            function, options = quantized_lora_linear, {**options, **base.kernel}
        node = graph.call_function(function, given, options)
    node.meta[META_KEY] = tag
    found.total.replace_all_uses_with(node)
    for old in (found.total, *found.inner):
        graph.erase_node(old)
    for user in tuple(found.base.users):
        # A cast to the dtype of the output: of this branch's factors, or of another adapter's.
        if user.users:
            user.replace_input_with(found.base, node)
        else:
            graph.erase_node(user)
    graph.erase_node(found.base)


def _tag(node: fx.Node) -> Tag | None:
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) and tag.adapter else None
