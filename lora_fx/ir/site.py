"""Sites: linear operations that were found, how their weights are stored, and the protocol of patterns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from lora_fx.ir.graph import Region, Role, join

__all__ = [
    "BranchBuilder",
    "Call",
    "Factors",
    "Layout",
    "Match",
    "Matches",
    "NoOperator",
    "OnnxBuilder",
    "OnnxOperator",
    "OnnxProduct",
    "OnnxWeight",
    "OutputBuilder",
    "Pattern",
    "Quantization",
    "Rejection",
    "Site",
]

Layout = Literal["out_in", "in_out"]
"""How a weight is stored: ``[out, in, ...]`` (``nn.Linear``) or ``[in, out]`` (``x @ W``)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is stored.

    Attributes:
        scheme: Name of the format, as ``nf4`` or ``int8``.
        bits: Bits of one value, without the scales.
        library: Whose format it is: that of :class:`lora_fx.formats.WeightFormat`.
        shape: Rows and columns of the matrix, [out, in].
        dtype: What its values are when they are needed.
        block_size: Values that share a scale, along a row or along the flattened matrix; None for one
            scale a row.
        double: Whether the scales are quantized, too (arXiv:2305.14314, section 3).
    """

    scheme: str
    bits: int
    library: str
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int | None = None
    double: bool = False

    def __str__(self) -> str:
        blocks = "a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.scheme} ({self.library}, {blocks}{', double' if self.double else ''})"


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One place where a site's weight is applied.

    Attributes:
        region: Key of the region (:attr:`Region.key`).
        input, output: Names of nodes in its graph.
        pattern: Name of the pattern that found it.
        cast: Whether the weight is cast before it is applied.
        left: Whether it is the left operand of a product, so that the outputs are not the last dimension.
        bias: Name of the node that the operation adds, empty for none: a vector of the output features
            for a convolution, else anything that meets the output.
        axes: Where the output features lie in the output, counted from its end; several where they are
            taken apart, empty where nothing says.
        sizes: Their sizes, where there are several.
    """

    region: str
    input: str
    output: str
    pattern: str
    cast: bool = False
    left: bool = False
    bias: str = ""
    axes: tuple[int, ...] = (-1,)
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear operation that an adapter can be put on.

    A weight that is applied in several places is one site with several calls.

    Attributes:
        name: FQN: the module's, or the parameter's where no module stands for the operation.
        pattern: Name of the pattern that found it.
        family: ``linear``, ``conv`` or ``embedding``; decides what ``target_modules=None`` selects.
        weight: FQN of the weight.
        bias: FQN of the bias, if there is one that is a parameter.
        in_features, out_features: Sizes of one input and one output vector (channels, for a
            convolution; vocabulary and width, for an embedding).
        layout: How the weight is stored.
        weight_shape: Shape of the weight.
        calls: Where it is applied.
        groups: Groups of a convolution.
        experts: Number of experts of a three-dimensional weight.
        rows: Which rows of the weight it is (start, stop), for a weight that is applied in parts;
            None for all of them.
        view: The shape in which it is applied, where that is not the weight's own.
        order: How the dimensions of the weight are permuted before it is viewed so; None for not at all.
        parts: What its output is cut into, by name, with the rows (start, stop) that make it.
        whole: The site of which this is such a part: the operation applies the whole weight.
        attention: FQN of the ``nn.MultiheadAttention`` of which this is a projection; empty for any other.
        tied_to: FQNs of other parameters over the same storage.
        head: Where it makes the model's output: ``declared`` by the model or ``found`` in the
            graph; empty for any other operation.
        router: Whether its output decides which experts of a mixture see a token.
        all_linear: Whether it is a layer that ``target_modules="all-linear"`` stands for.
        quantized: How the weight is stored, if it is quantized; ``weight_shape`` and ``layout`` are
            those of its values.
        loss: Of a head: "chunked" if a loss of its output may be computed in chunks, else why it is not.
            Empty where that was not looked for.
    """

    name: str
    pattern: str
    family: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    layout: Layout
    weight_shape: tuple[int, ...]
    calls: tuple[Call, ...]
    groups: int = 1
    experts: int | None = None
    rows: tuple[int, int] | None = None
    view: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    parts: tuple[tuple[str, tuple[int, int]], ...] = ()
    whole: Site | None = None
    attention: str = ""
    tied_to: tuple[str, ...] = ()
    head: Literal["", "declared", "found"] = ""
    router: bool = False
    all_linear: bool = False
    quantized: Quantization | None = None
    loss: str = ""

    @property
    def owner(self) -> str:
        """FQN of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The weight's name in its owner."""
        return self.weight.rpartition(".")[2]

    @property
    def holder(self) -> str:
        """FQN of the module that holds the factors: the owner, or a child of it for a parameter."""
        if self.parameter == "weight" and self.rows is None:
            return self.owner
        # Of a part (``w.0_8``) the parameter's name, too: another parameter has a part of that name.
        part_of_parameter = self.name.rpartition(".")[0] == self.weight != self.owner
        leaf = self.name.split(".")[-2 if part_of_parameter else -1 :]
        return join(self.owner, f"{'_'.join(leaf)}_lora")

    @property
    def part_of(self) -> str:
        """The name of :attr:`whole`; empty where there is none."""
        return "" if self.whole is None else self.whole.name

    @property
    def place(self) -> str:
        """The weight, with the rows of it that the site covers."""
        return self.weight if self.rows is None else f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of the rows of it that the site covers."""
        if self.rows is None:
            return self.weight_shape
        rows = self.rows[1] - self.rows[0]
        if self.layout == "in_out":
            return (self.weight_shape[0], rows)
        return (rows, *self.weight_shape[1:])

    @property
    def divisible(self) -> bool:
        """Whether some of its output features can have an adapter of their own."""
        plain = self.family == "linear" and self.rows is None and self.experts is None
        return plain and all(call.axes == (-1,) for call in self.calls)

    def part(self, name: str, rows: tuple[int, int]) -> Site:
        """The site of some of the output features.

        Args:
            name: What it is called, after this site's name.
            rows: Which (start, stop).
        """
        return dataclasses.replace(
            self,
            name=f"{self.name}.{name}",
            out_features=rows[1] - rows[0],
            rows=rows,
            parts=(),
            whole=self,
        )

    @property
    def applied_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is applied: its own, or that of a view of it."""
        return self.view or self.weight_shape

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as it is applied: a view, or a copy where there is no such view."""
        permuted = weight if self.order is None else weight.permute(self.order)
        return permuted.reshape(self.applied_shape)

    def stored(self, applied: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`applied`: return a tensor in the weight's shape."""
        if self.order is None:
            return applied.reshape(self.weight_shape)
        order = self.order
        permuted = applied.reshape([self.weight_shape[axis] for axis in order])
        return permuted.permute(sorted(range(len(order)), key=order.__getitem__))

    @property
    def axis(self) -> int:
        """The axis of :attr:`applied_shape` along which a merge may go slice by slice.

        The experts where there are any, else the output features. ``B`` has the slices along its first
        axis, and so has ``A`` with experts.
        """
        return 0 if self.layout == "out_in" or self.experts else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """An operation or a weight that cannot have an adapter, with the reason and the remedy.

    Attributes:
        name: FQN of the weight or module, or the node's name where there is none.
        reason: Why not, and what would change it.
        region: FQN of the region in which it was seen.
        node: Name of the node in that region's graph.
    """

    name: str
    reason: str
    region: str = ""
    node: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """Names by which a configuration may select it: its own, and that of its weight."""
        return self.name, f"{self.name}.weight"


Match = Site | Rejection | None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Every linear operation of a model, and the operations that were refused, with reasons."""

    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """Shapes and names of the two factors of a site at some rank.

    Attributes:
        a: Shape of A, rank first.
        b: Shape of B, rank second.
        stacked: Whether both have one more axis before those, for experts.
        name_a, name_b: Attribute names on the holder (PEFT's).
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    name_a: str = "lora_A"
    name_b: str = "lora_B"
    stacked: bool = False

    @property
    def rank(self) -> int:
        """The rank, r."""
        return self.a[1 if self.stacked else 0]

    @property
    def fan_in(self) -> tuple[int, int]:
        """How many terms an output of A sums, and one of B."""
        first = 2 if self.stacked else 1
        return math.prod(self.a[first:]), math.prod(self.b[first:])

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return math.prod(self.a) + math.prod(self.b)


class BranchBuilder(Protocol):
    """What a pattern writes a branch with; every node that it makes is tagged."""

    @property
    def a(self) -> fx.Node:
        """A, in the dtype in which the branch computes."""

    @property
    def b(self) -> fx.Node:
        """B."""

    @property
    def bias(self) -> fx.Node | None:
        """The bias of the operation that applies B, [out], or None.

        A pattern that does not ask for it has it added to its branch.
        """

    def dropped(self, x: fx.Node) -> fx.Node:
        """``x`` after the adapter's dropout."""

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node."""

    def low_rank(self, x: fx.Node, *, with_bias: bool = True) -> fx.Node:
        """``B (A drop(x))``, plus :attr:`bias`, for a product that reads ``x``: it can become one node."""

    def item(self, letter: str, index: int) -> fx.Node:
        """One expert's matrix of the factor ``a`` or ``b``."""


class OutputBuilder(BranchBuilder, Protocol):
    """What an adapter kind writes the output of an adapted operation with.

    Factors and slots are read where they are first used, once each.

    Attributes:
        site: The site, as its region sees it.
        applied: Where its weight is applied.
        base: The operation without any adapter.
        total: The operation with the adapters that are there already; ``base`` if there are none.
        scale: The factor of the branch.
        padding: How many output features of the operation come before and after the site's; None if it
            has all.
    """

    site: Site
    applied: Call
    base: fx.Node
    total: fx.Node
    scale: float
    padding: tuple[int, int] | None

    @property
    def operand_bias(self) -> fx.Node:
        """The bias that the operation adds (:attr:`Call.bias`)."""

    @property
    def operands(self) -> tuple[Any, Any, Any]:
        """Input, weight and bias of an operation that has these arguments."""

    @property
    def bias_taken(self) -> bool:
        """Whether the pattern has taken :attr:`bias` into its branch."""

    def factor(self, letter: str) -> fx.Node:
        """A or B, rank where it belongs, in its own dtype."""

    def cast_factor(self, letter: str) -> fx.Node:
        """The same in the dtype in which the branch computes."""

    def read_slot(self, name: str, role: Role = Role.FACTOR) -> fx.Node:
        """A slot, as it is stored."""

    def cast_slot(self, name: str) -> fx.Node:
        """A slot, in the dtype in which the branch computes."""

    def spread_slot(self, name: str, outside: float) -> fx.Node:
        """A slot, shaped to broadcast against the output and in its dtype.

        Args:
            name: The slot.
            outside: What output features get that are not the site's.
        """

    def read_weight(self, role: Role) -> fx.Node:
        """The weight of the site."""

    def cast(self, node: fx.Node) -> fx.Node:
        """A node in the dtype in which the branch computes."""

    def spread(self, vector: fx.Node) -> fx.Node:
        """A vector of the output features, shaped to broadcast against the output."""

    def padded(self, up: fx.Node) -> fx.Node:
        """The output of a branch, with zeros for output features outside the site."""

    def once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        """What ``make`` writes; it is called once for each key."""

    def fuse_by(
        self,
        function: Callable[..., Any],
        *more: Any,
        quantized: Callable[..., Any] | None = None,
        rows: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        less: Mapping[str, Any] | None = None,
    ) -> None:
        """Say which function computes an operation with its branch, where that is :meth:`low_rank`.

        Args:
            function: It takes input, weight, bias, A, B and the scale.
            more: What it takes after those: nodes and values.
            quantized: The same over a quantized weight; None if nothing computes that.
            rows: What computes the operation with the branches of several adapters, each of which has rows of
                its own, and the same over a quantized weight. They take what
                :func:`lora_fx.runtime.fused_rows.lora_rows` takes. None if nothing computes that.
            less: Options with which ``function`` keeps less for the backward, and computes more: what
                ``memory="balanced"`` takes.
        """


@runtime_checkable
class Pattern(Protocol):
    """One kind of linear operation: how to find it and what its algebra is.

    Matching never edits. ``branch`` is the only method that writes into a graph, through a builder.
    """

    @property
    def name(self) -> str:
        """Unique name, kebab-case; shown in the dry run."""

    def match(self, node: fx.Node, region: Region) -> Match:
        """Return a site, a refusal with its reason, or None if the node is not of this kind."""

    def factors(self, site: Site, rank: int) -> Factors:
        """Shapes and names of A and B."""

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Writes ``x -> dropout -> A -> B`` and returns its node; the caller scales and adds."""

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``B A`` in the weight's layout, unscaled, in the factors' dtype.

        With some rows of B only, the matching slice of the weight's output axis; with some experts
        of both, those (a grouped convolution is never sliced). See :attr:`Site.axis`.
        """

    def flops(self, site: Site, rank: int) -> int:
        """Extra multiply-adds times two for one token, pixel or index."""


# --- what a weight format tells an export ---------------------------------------------------------
# What a weight format tells an export, in words that need no ONNX: arrays, an operator, and its
# nodes.


class OnnxBuilder(Protocol):
    """Makes the nodes of one product in an ONNX graph."""

    def op(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: Any = None,
    ) -> Any:
        """Make a node of ONNX.

        Args:
            name: Of its operator.
            inputs: Values.
            attributes: By name.
            like: A value whose dtype the output has.
        """

    def product(
        self,
        name: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        like: Any = None,
    ) -> Any:
        """Make the node of the product, which gets the name of the operation."""

    def ints(self, numbers: Sequence[int]) -> Any:
        """Make a constant of whole numbers."""

    def rank(self, value: Any) -> int:
        """Number of dimensions."""

    def same_dtype(self, one: Any, other: Any) -> bool:
        """Whether two values have one dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxProduct:
    """The product ``x Wᵀ`` that nodes are made for.

    Attributes:
        x: [..., in].
        arrays: Codes, scales and, where there are some, zero points: values of the file.
        rows: Of the matrix, [out, in].
        columns: Likewise.
        block: Values that share a scale.
        scheme: That of :class:`lora_fx.ir.Quantization`.
    """

    x: Any
    arrays: tuple[Any, ...]
    rows: int
    columns: int
    block: int
    scheme: str


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxOperator:
    """An operator that reads a quantized weight.

    Attributes:
        name: What reports call it.
        nodes: Makes the nodes of a product, and gives their value.
        dequantizes: Whether it makes the values, which a product of its own reads: its scales keep all of
            their digits then, and a block may be a whole row.
    """

    name: str
    nodes: Callable[[OnnxBuilder, OnnxProduct], Any]
    dequantizes: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxWeight:
    """A matrix [out, in] as an operator reads it.

    Attributes:
        operator: Which one.
        codes: uint8 or int8, in the shape that the operator asks for.
        scales: fp32, one a block.
        zeros: Zero points as the operator has them; None where all are in the middle.
        block: Values that share a scale.
        fresh: Whether the codes are in memory of their own, and not in the weight's.
    """

    operator: OnnxOperator
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    fresh: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class NoOperator:
    """Why a weight cannot be exported as it is stored.

    Attributes:
        reason: What is said after its name.
        remedy: What to do; None for the dense export, which is always possible.
    """

    reason: str
    remedy: str | None = None
