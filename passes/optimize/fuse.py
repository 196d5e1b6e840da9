"""Passes that fuse linear operations with their branches, and make the other branches cheaper.

- :class:`Fuse` turns an operation and its branch into one node. The adapter kind has named the function
  (:meth:`lora_fx.ir.OutputBuilder.fuse_by`), and ``insert`` has stored it on the node that adds the branch.
  This pass checks that the function can compute the operation.
- :class:`ShareInputs` then joins fused operations that read the same input (``fused_lora.lora_linears``). q,
  k and v of an attention layer get one product with all their A's, and one gradient of their input. The
  operations must be in one graph. This is so if ``export`` has captured the model as a whole, or if one
  module applies several weights.
- :class:`FuseRows` serves a batch whose rows have different adapters. It turns an operation and the
  branches of all adapters into one node.
- :class:`Deploy` fuses the operations whose adapted weight is trained for a storage (``deploy=``). It runs
  even without optimization, because only the fused function rounds the weight.
- :class:`CheapDropout` gives branches that are not fused a dropout with a small mask
  (:func:`lora_fx.runtime.kernels.masks.dropped`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.errors import CaptureError
from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import (
    DEFAULT_MEMORY,
    META_KEY,
    FusedBranch,
    Memory,
    Region,
    Role,
    Tag,
    join,
    role_of,
    sums_on,
    tag_of,
)
from lora_fx.passes.graph import GraphPass, arguments, copy_graph, may_write, target_of
from lora_fx.passes.insert import ROWS
from lora_fx.passes.patterns import ARGUMENTS, Product, product_of, weight_of
from lora_fx.runtime.kernels import deployed, fused_lora, masks

__all__ = [
    "Base",
    "CheapDropout",
    "Deploy",
    "Fuse",
    "FuseRows",
    "ShareInputs",
]


@dataclasses.dataclass(frozen=True)
class Base:
    """Linear operation that a fused function can compute together with a branch.

    Attributes:
        x: The node that it reads.
        weight: The node with the weight as the operation multiplies by it.
        bias: The node of the bias, or None.
        turned: True if the weight is [in, out].
        outputs: Number of output features.
        kernel: For a quantized weight, the options of its product: arguments of
            :func:`lora_fx.runtime.kernels.fused_lora.quantized_lora_linear`. None for any other weight.
    """

    x: fx.Node
    weight: fx.Node
    bias: Any
    turned: bool
    outputs: int
    kernel: Mapping[str, Any] | None = None


def _base_of(node: fx.Node, region: Region) -> Base | None:
    """Return the linear operation of a node, or None if no fused function can compute the operation."""
    return _quantized(node, region) or _multiplied(node, region)


def _quantized(node: fx.Node, region: Region) -> Base | None:
    """Return the linear operation of a node if its weight is quantized; None for any other node."""
    if target_of(node) is not quantized_linear:
        return None
    named: dict[str, Any] = arguments(node, ARGUMENTS)
    quantization = quantization_of(region.parameter(named["weight"]))
    if quantization is None:
        return None
    names = {"compute_dtype": None, "threshold": None, "training": "base_training"}
    # Options with their default value are left out.
    kernel = {ours or name: named[name] for name, ours in names.items() if named[name]}
    operands = (named["x"], named["weight"], named["bias"])
    return Base(*operands, turned=False, outputs=quantization.shape[0], kernel=kernel)


def _multiplied(node: fx.Node, region: Region) -> Base | None:
    """Return the linear operation of a node if its weight is a dense matrix; None for any other node."""
    product = product_of(node, region)
    if not isinstance(product, Product) or not _fits(product, region):
        return None
    outputs = product.view.shape[0 if product.layout == "out_in" else 1]
    turned = product.operand_layout == "in_out"
    return Base(product.x, product.operand, product.bias, turned, outputs)


def _fits(product: Product, region: Region) -> bool:
    """Return True if the fused functions can compute a product: its weight is dense, its bias a vector."""
    view, weight = product.view, region.parameter(product.view.source)
    if product.left or view.indexed or len(view.shape) != 2 or weight is None:
        return False
    # Products with quantized weights are separate functions.
    if type(weight.data) is not torch.Tensor:
        return False
    bias = product.bias
    if bias is None:
        return True
    # addmm may add any tensor, not only a bias.
    source = weight_of(bias, region)
    return source is not None and len(source.shape) == 1


@dataclasses.dataclass(frozen=True)
class Fuse(GraphPass):
    """Pass that replaces each operation and its branch by one node, if a function computes both.

    Attributes:
        memory: If it is not "fast", functions keep less for the backward, if they can.
    """

    memory: Memory = DEFAULT_MEMORY
    name: ClassVar[str] = "fuse"

    def edited(self, region: Region) -> fx.Graph | None:
        """Fuse every branch that can be fused."""
        if not any(_fused_branch_of(node) for node in region.graph.nodes):
            return None
        graph = copy_graph(region.graph)
        copied = region.with_graph(graph)
        nodes = {node.name: node for node in graph.nodes}
        # In the order of the graph, because an operation may read the output of an earlier one.
        fused = [
            _fuse(node, copied, nodes, self.memory)
            for node in nodes.values()
            if _fused_branch_of(node)
        ]
        graph.lint()
        return graph if any(fused) else None


@dataclasses.dataclass(frozen=True)
class Deploy(GraphPass):
    """Pass that replaces operations by functions that round their adapted weight as it will be stored."""

    name: ClassVar[str] = "deploy"

    def edited(self, region: Region) -> fx.Graph | None:
        """Fuse every branch whose weight is trained for a storage.

        Raises:
            CaptureError: If an operation is written in a way that the function cannot compute.
        """
        if not any(map(_is_deployed, region.graph.nodes)):
            return None
        graph = copy_graph(region.graph)
        copied = region.with_graph(graph)
        nodes = {node.name: node for node in graph.nodes}
        for node in [node for node in nodes.values() if _is_deployed(node)]:
            weight = node.meta[META_KEY].weight
            if not _fuse(node, copied, nodes, DEFAULT_MEMORY):
                raise CaptureError(
                    f"{join(region.fqn, weight)}: deploy= cannot round this weight in its operation "
                    f"({node.args[0]}): leave the operation out with exclude_modules"
                )
        graph.lint()
        return graph


def _is_deployed(node: fx.Node) -> bool:
    branch = _fused_branch_of(node)
    return branch is not None and branch.deploy is not None


def _fuse(total: fx.Node, region: Region, nodes: Mapping[str, fx.Node], memory: Memory) -> bool:
    """Replace an operation and its branch by one fused node. Return False if no function computes both."""
    tag: Tag = total.meta[META_KEY]
    base: Any = total.args[0]
    branch, product = tag.fused, _base_of(base, region)
    if branch is None or product is None or not branch.first or not _only_inside(base, tag):
        return False
    function = branch.function if product.kernel is None else branch.quantized
    more = branch.more
    if branch.deploy is not None:
        function, more = deployed.deployed_linear, (branch.deploy,)
    if function is None:
        return False
    graph, fused = region.graph, dataclasses.replace(tag, role=Role.FUSED, fused=None)
    options: dict[str, Any] = {}
    if branch.dropout is not None:
        p, training = branch.dropout
        options = {"dropout": nodes[p], "training": nodes[training]}
    if branch.padding is not None:
        options["rows"] = (branch.padding[0], product.outputs - branch.padding[1])
    if memory != "fast" and product.kernel is None:
        options |= branch.less
    options |= product.kernel or {}
    with graph.inserting_before(total):
        weight = product.weight
        if product.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = fused
        a, b = nodes[branch.a], nodes[branch.b]
        values = (nodes.get(value, value) for value in more)
        operands = (product.x, weight, product.bias, a, b, branch.scale, *values)
        node = graph.call_function(function, operands, options)
    node.meta[META_KEY] = fused
    total.replace_all_uses_with(node)
    for old in _from(total, base):
        if not old.users and _is_of(old, tag) and old is not node:
            graph.erase_node(old)
    for user in tuple(base.users):
        # The remaining users cast another adapter's factors to the dtype of the output.
        user.replace_input_with(base, node)
    graph.erase_node(base)
    return True


def _from(last: fx.Node, first: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes of the graph from `last` back to the node after `first`. The caller may erase them."""
    while last is not first:
        before = last.prev
        yield last
        last = before


def _fused_branch_of(node: fx.Node) -> FusedBranch | None:
    """Return the fused form that ``insert`` stored on a node that adds a branch; None for any other node."""
    tag = tag_of(node)
    return None if tag is None else tag.fused


def _is_of(node: fx.Node, branch: Tag) -> bool:
    """Return True if a node belongs to the branch of a tag: same weight, same adapter."""
    tag = tag_of(node)
    return tag is not None and (tag.weight, tag.adapter) == (branch.weight, branch.adapter)


def _only_inside(base: fx.Node, branch: Tag) -> bool:
    """Return True if only a branch reads the output of its base operation. Reads of the dtype do not count.

    The output then need not exist, so both can be fused.
    """
    return all(_is_of(user, branch) or role_of(user) is Role.CAST for user in base.users)


@dataclasses.dataclass(frozen=True)
class CheapDropout(GraphPass):
    """Pass that gives unfused branches a dropout whose mask takes one bit for each element."""

    name: ClassVar[str] = "cheap-dropout"

    def edited(self, region: Region) -> fx.Graph | None:
        """Replace the dropout of each branch that has one as a separate node."""
        if not any(_drops(node) for node in region.graph.nodes):
            return None
        graph = copy_graph(region.graph)
        for node in graph.nodes:
            if _drops(node):
                values: dict[str, Any] = arguments(node, "input p=0.5 training=True")
                node.target, node.kwargs = masks.dropped, {}
                node.args = (values["input"], values["p"], values["training"])
        graph.lint()
        return graph


def _drops(node: fx.Node) -> bool:
    return node.target is F.dropout and role_of(node) is Role.DROPOUT


@dataclasses.dataclass(frozen=True)
class ShareInputs(GraphPass):
    """Pass that replaces fused operations that read the same input by one node."""

    name: ClassVar[str] = "share-inputs"

    def edited(self, region: Region) -> fx.Graph | None:
        """Join every group of fused operations that read the same input."""
        if not _groups(region.graph):
            return None
        graph = copy_graph(region.graph)
        for group in _groups(graph):
            _join(graph, group)
        graph.lint()
        return graph


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Group fused operations without dropout that read the same input, in the order of the graph."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    writes = 0
    for node in graph.nodes:
        writes += may_write(node)
        if node.target is fused_lora.lora_linear and "dropout" not in node.kwargs:
            # A write between two operations may change the input of the second.
            groups[node.args[0], _parent(node), writes].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _parent(node: fx.Node) -> str:
    """Return the FQN of the module around the layer of an operation, such as the attention of a q_proj.

    Only operations with the same parent are joined. Those of different modules are not, even if they read the
    same input. In a decoder, for instance, the keys of every layer read the encoder's output.
    """
    tag: Tag = node.meta[META_KEY]
    path = tag.weight.split(".")
    # For the weight of a layer it is the layer's parent. Otherwise the parameter is in the module itself.
    return ".".join(path[: -2 if path[-1] == "weight" else -1])


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    for node in group[1:]:
        for argument in node.args[1:]:
            if isinstance(argument, fx.Node):
                _move(argument, first)
    columns = list(zip(*(node.args[1:] for node in group), strict=True))
    rows = tuple(node.kwargs.get("rows") for node in group)
    with graph.inserting_before(first):
        joint = graph.call_function(fused_lora.lora_linears, (first.args[0], *columns, rows))
        joint.meta[META_KEY] = first.meta[META_KEY]
        for index, node in enumerate(group):
            item = graph.call_function(operator.getitem, (joint, index))
            item.meta[META_KEY] = node.meta[META_KEY]
            node.replace_all_uses_with(item)
    for node in group:
        graph.erase_node(node)


def _move(node: fx.Node, before: fx.Node) -> None:
    """Move a node that reads a parameter or is computed from parameters before another node.

    Its inputs move first.
    """
    if node < before:
        return
    for source in node.all_input_nodes:
        _move(source, before)
    before.prepend(node)


@dataclasses.dataclass(frozen=True)
class FuseRows(GraphPass):
    """Pass that replaces each operation and the branches of several adapters by one node.

    Each adapter applies to its own rows. The adapter kind has named the function that computes several of
    its branches together. Branches of other kinds stay after the node, and
    :class:`lora_fx.passes.insert.SelectRows` restricts them to their rows. The order of branches does not
    matter, because no row has two adapters.
    """

    name: ClassVar[str] = "fuse-rows"

    def edited(self, region: Region) -> fx.Graph | None:
        """Fuse the operations whose branches a function computes together."""
        if not _joint_operations(region):
            return None
        graph = copy_graph(region.graph)
        copied = region.with_graph(graph)
        nodes = {node.name: node for node in graph.nodes}
        for joint in _joint_operations(copied):
            _fuse_joint(joint, copied, nodes)
        graph.lint()
        return graph


class _Joint(NamedTuple):
    """Operation with branches of several adapters, and the function that can compute them together.

    Attributes:
        node: The node of the operation.
        base: The operation.
        function: The function that computes all of them.
        sums: Nodes that add the branches.
    """

    node: fx.Node
    base: Base
    function: Any
    sums: Sequence[fx.Node]


def _joint_operations(region: Region) -> list[_Joint]:
    """Return the operations whose branches of several adapters can be fused, in the order of the graph."""
    joints = []
    for node in region.graph.nodes:
        if role_of(node) is not Role.BASE:
            continue
        base = _base_of(node, region)
        if base is None or not _only_adapters(node):
            continue
        by_function = defaultdict(list)
        for total in sums_on(node):
            branch = _fused_branch_of(total)
            if branch is not None and branch.rows is not None:
                by_function[branch.rows[base.kernel is not None]].append(total)
        if by_function:
            function, sums = max(by_function.items(), key=lambda item: len(item[1]))
            joints.append(_Joint(node, base, function, sums))
    return joints


def _only_adapters(base: fx.Node) -> bool:
    """Return True if only adapters' branches read the output of a base operation, so that it can be fused."""
    return all((tag := tag_of(user)) is not None and tag.adapter for user in base.users)


def _fuse_joint(joint: _Joint, region: Region, nodes: Mapping[str, fx.Node]) -> None:
    graph, base, old = region.graph, joint.base, joint.node
    tags: list[Tag] = [total.meta[META_KEY] for total in joint.sums]
    branches = [branch for total in joint.sums if (branch := _fused_branch_of(total)) is not None]
    whole = Tag(old.meta[META_KEY].weight, Role.FUSED)
    for branch in branches:
        for name in (branch.a, branch.b, *(branch.dropout or ())):
            _move(nodes[name], old)
    with graph.inserting_before(old):
        weight = base.weight
        if base.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = whole
        table = graph.get_attr(join(_holder(nodes[branches[0].a]), ROWS))
        table.meta[META_KEY] = whole
        groups = (
            (base.x, weight, base.bias, table, tuple(tag.adapter for tag in tags)),
            (
                tuple(nodes[branch.a] for branch in branches),
                tuple(nodes[branch.b] for branch in branches),
            ),
            (
                tuple(branch.scale for branch in branches),
                tuple(_dropout(branch, nodes) for branch in branches),
            ),
            (tuple(_part(branch, base) for branch in branches), whole.weight),
        )
        arguments = tuple(argument for group in groups for argument in group)
        fused = graph.call_function(joint.function, arguments, dict(base.kernel or {}))
    fused.meta[META_KEY] = whole
    for total in joint.sums:
        total.replace_all_uses_with(total.args[0])  # type: ignore[arg-type]
    old.replace_all_uses_with(fused)
    for total in joint.sums:
        graph.erase_node(total)
    _erase_unread(graph, {(tag.weight, tag.adapter) for tag in tags})
    graph.erase_node(old)


def _dropout(branch: FusedBranch, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...] | None:
    return None if branch.dropout is None else tuple(nodes[name] for name in branch.dropout)


def _part(branch: FusedBranch, base: Base) -> tuple[int, int] | None:
    """Return the range (first, last + 1) of output features that a branch adds to; None for all of them."""
    if branch.padding is None:
        return None
    return branch.padding[0], base.outputs - branch.padding[1]


def _holder(factor: fx.Node) -> str:
    """Return the FQN of the module that has a factor. It also has the table of the adapters' rows."""
    while factor.op != "get_attr":
        factor = factor.all_input_nodes[
            0
        ]  # a kind computes it from the stored factor and slots beside it
    return str(factor.target).rpartition(".")[0].rpartition(".")[0]


def _erase_unread(graph: fx.Graph, branches: set[tuple[str, str]]) -> None:
    for node in reversed(graph.nodes):
        tag = tag_of(node)
        if tag is not None and (tag.weight, tag.adapter) in branches and not node.users:
            graph.erase_node(node)
