"""Makes one node of a linear operation and its branch.

It is :func:`lora_fx.runtime.fused_lora.lora_linear`, or with DoRA
:func:`lora_fx.runtime.fused_dora.dora_linear`, which reads the node of the gain, or over a quantised weight
:func:`lora_fx.runtime.fused_quantized.quantized_lora_linear`. It comes after the branches;
:mod:`lora_fx.passes.optimize.fuse` says which it takes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import META_KEY, Capture, Pass, PassResult, Region, Role, Tag
from lora_fx.passes.graph import arguments, copy_graph, edit_graphs, target_of
from lora_fx.passes.patterns import ARGUMENTS, Product, product_of, weight_of
from lora_fx.runtime import (
    cast_like,
    dora,
    dora_linear,
    lora_linear,
    pad_features,
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
        kernel: How a product with a quantised weight is computed: arguments of
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
        inner: The nodes between them: not those that read the factors, and not the gain.
        a: The node that reads A.
        b: The node that reads B.
        scale: The factor of the branch.
        dropout: Probability, and the node that says whether there is any now.
        rows: Which outputs the branch is added to; None for all.
        gain: The node of DoRA's gain; None without.
        again: Whether the base product is made again for the gradient of the gain.
    """

    operation: Base
    base: fx.Node
    total: fx.Node
    inner: tuple[fx.Node, ...]
    a: fx.Node
    b: fx.Node
    scale: float
    dropout: tuple[float, Any] = (0.0, False)
    rows: tuple[int, int] | None = None
    gain: fx.Node | None = None
    again: bool = False


def role_of(node: object) -> Role | None:
    """What a node does for an adapter; None if nothing, or no node."""
    tag = node.meta.get(META_KEY) if isinstance(node, fx.Node) else None
    return tag.role if isinstance(tag, Tag) else None


def fusable(total: fx.Node, region: Region) -> Fusable | None:
    """The branch that a node adds to a linear operation; None if it is something else."""
    read = _READERS.get(total.target) if role_of(total) is Role.ADD else None
    if read is None:
        return None
    base = total.args[0]
    if not isinstance(base, fx.Node) or role_of(base) is not Role.BASE:
        return None
    operation = _quantized(base, region) or _multiplied(base, region)
    if operation is None:
        return None
    found = read(total, operation, _Chain())
    if found is None or not _only_inside(base, (*found.inner, total)):
        return None
    return found


class _Chain:
    """Steps along a branch from its end, and the nodes that were passed."""

    def __init__(self) -> None:
        self.passed: dict[fx.Node, None] = {}

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


def _plain(total: fx.Node, operation: Base, chain: _Chain) -> Fusable | None:
    """``base + pad(linear(linear(drop(x), A), B) · s)``."""
    padded = chain.step(total.args[1], Role.PAD, pad_features)
    scaled = chain.step(padded[0] if padded else total.args[1], Role.SCALE, operator.mul)
    if not scaled:
        return None
    ends = _ends(scaled[0], operation, chain, 2)
    if ends is None:
        return None
    rows = _rows(padded[1:], operation) if padded else None
    return _made(total, operation, chain, ends, _uncast(ends.b), scaled[1], rows)


def _decomposed(total: fx.Node, operation: Base, chain: _Chain) -> Fusable | None:
    """``rescaled(base, None, up, gain, ...)`` or ``recomputed(base, up, gain, ...)``."""
    if operation.kernel is not None:
        return None
    again = total.target is dora.recomputed
    given: tuple[Any, ...] = total.args
    up, gain = given[1:3] if again else given[2:4]
    if not again and total.args[1] is not None:
        return None
    padded = chain.step(gain, Role.PAD, F.pad)
    gain = padded[0] if padded else gain
    # The gain may also meet the output as more than a vector at its end: that is not this function.
    if role_of(gain) is not Role.MAGNITUDE or target_of(gain) is not dora.gain:
        return None
    # The bias less its gain is added to the branch, or by the product with B itself.
    added = chain.step(up, Role.MAGNITUDE, operator.add)
    up, shift = added or (up, None)
    up = chain.skip(up, Role.PAD, pad_features) if padded else up
    ends = _ends(up, operation, chain, 2 if added or operation.bias is None else 3)
    if ends is None:
        return None
    shift = ends.shift if shift is None else shift
    steered = chain.step(_past_cast(ends.b, chain), Role.SCALE, dora.steered)
    shifted = chain.step(shift, Role.MAGNITUDE, dora.shifted)
    if not steered or (shift is not None and not shifted):
        return None
    for constant in (steered[1], *shifted[1:2]):
        chain.step(constant, Role.MAGNITUDE, dora.held)
    rows = _rows(padded[1], operation) if padded else None
    found = _made(total, operation, chain, ends, steered[0], steered[2], rows)
    return dataclasses.replace(found, gain=gain, again=again)


@dataclasses.dataclass(frozen=True)
class _Ends:
    """The two small products: what they read."""

    a: fx.Node
    b: fx.Node
    shift: Any
    dropout: tuple[float, Any]


def _ends(up: Any, operation: Base, chain: _Chain, operands: int) -> _Ends | None:
    """``linear(linear(drop(x), A), B)``, and what the outer one adds if it has three operands."""
    outer = chain.step(up, Role.UP, *_LINEAR)
    inner = chain.step(outer[0], Role.DOWN, *_LINEAR) if len(outer) == operands else ()
    if len(inner) != 2:
        return None
    dropped = chain.step(inner[0], Role.DROPOUT, F.dropout)
    if (dropped[0] if dropped else inner[0]) is not operation.x:
        return None
    dropout = (dropped[1], dropped[2]) if dropped else (0.0, False)
    return _Ends(inner[1], outer[1], outer[2] if operands == 3 else None, dropout)


def _made(
    total: fx.Node,
    operation: Base,
    chain: _Chain,
    ends: _Ends,
    b: fx.Node,
    scale: float,
    rows: tuple[int, int] | None,
) -> Fusable:
    base: Any = total.args[0]
    a = _uncast(ends.a)
    return Fusable(operation, base, total, chain.inner, a, b, scale, ends.dropout, rows)


_READERS: dict[Any, Callable[[fx.Node, Base, _Chain], Fusable | None]] = {
    operator.add: _plain,
    dora.rescaled: _decomposed,
    dora.recomputed: _decomposed,
}


def _quantized(node: fx.Node, region: Region) -> Base | None:
    """A product with a quantised weight."""
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
    # A quantised weight has a product of its own.
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


def _past_cast(factor: fx.Node, chain: _Chain) -> fx.Node:
    """As :func:`_uncast`, of what is between: the cast goes away with it."""
    uncast = _uncast(factor)
    if uncast is not factor:
        chain.passed[factor] = None
    return uncast


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


def _replace(graph: fx.Graph, branch: Fusable) -> None:
    tag = dataclasses.replace(branch.total.meta[META_KEY], role=Role.FUSED)
    base = branch.operation
    with graph.inserting_before(branch.total):
        weight = base.weight
        if base.turned:
            weight = graph.call_function(torch.t, (weight,))
            weight.meta[META_KEY] = tag
        given: tuple[Any, ...] = (
            base.x,
            weight,
            base.bias,
            branch.a,
            branch.b,
            branch.scale,
        )
        function: Any = lora_linear
        if branch.gain is not None:
            function, given = dora_linear, (*given, branch.gain, branch.again)
        options: dict[str, Any] = {}
        if branch.dropout[0]:
            options = {"dropout": branch.dropout[0], "training": branch.dropout[1]}
        if branch.rows is not None:
            options["rows"] = branch.rows
        if base.kernel is not None:
            function, options = quantized_lora_linear, {**options, **base.kernel}
        node = graph.call_function(function, given, options)
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


def _tag(node: fx.Node) -> Tag | None:
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) and tag.adapter else None
