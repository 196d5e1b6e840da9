"""Sites: the linear operations of a model, the storage of their weights, and the protocol of patterns."""

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
"""Layout of a weight: ``[out, in, ...]`` (``nn.Linear``) or ``[in, out]`` (``x @ W``)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """The storage of a quantized weight.

    Attributes:
        scheme: Name of the format, such as ``nf4`` or ``int8``.
        bits: Bits of one value, without the scales.
        library: The library of the format, as in :class:`lora_fx.formats.WeightFormat`.
        shape: Rows and columns of the matrix, [out, in].
        dtype: The dtype of its dequantized values.
        block_size: Values that share a scale, along a row or along the flattened matrix; None for one scale
            a row.
        double: True if the scales are quantized, too (arXiv:2305.14314, section 3).
        stacked: Number of such matrices, if the weight is a stack of them; None for a single matrix. A stack
            looks like a dense weight, in any code.
    """

    scheme: str
    bits: int
    library: str
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int | None = None
    double: bool = False
    stacked: int | None = None

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape) * (self.stacked or 1)

    def __str__(self) -> str:
        blocks = "a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.scheme} ({self.library}, {blocks}{', double' if self.double else ''})"


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One application of a site's weight.

    Attributes:
        region: Key of the region (:attr:`Region.key`).
        input, output: Names of nodes in its graph.
        pattern: Name of the pattern that matched it.
        cast: True if the weight is cast before it is applied.
        left: True if the weight is the left operand of a product, so that the output features are not the
            last dimension.
        bias: Name of the node of the bias that the operation adds; empty for none. The bias of a convolution
            is a vector of the output features. Any other bias broadcasts against the output.
        axes: The axes of the output that have the output features, counted from the end. Several if the
            features are split over axes, empty if unknown.
        sizes: The sizes of the axes, if there are several.
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

    A weight that is applied several times is one site with several calls.

    Attributes:
        name: FQN of the module, or of the parameter if no module represents the operation.
        pattern: Name of the pattern that matched it.
        family: ``linear``, ``conv`` or ``embedding``; decides what ``target_modules=None`` selects.
        weight: FQN of the weight.
        bias: FQN of the bias; None unless the operation adds a bias that is a parameter.
        in_features, out_features: Sizes of one input and one output vector (channels, for a convolution;
            vocabulary and width, for an embedding).
        layout: The layout of the weight.
        weight_shape: Shape of the weight.
        calls: The applications of the weight.
        groups: Groups of a convolution.
        experts: Number of experts of a three-dimensional weight.
        rows: The rows of the weight (start, stop), for a weight that is applied in parts; None for all.
        view: The shape in which the weight is applied, if it is not the weight's own.
        order: The permutation of the weight's dimensions before that view; None for no permutation.
        parts: The parts into which its output is split, by name, each with its rows (start, stop).
        whole: For a site that is such a part: the site of the whole weight, which the operation applies.
        attention: FQN of the ``nn.MultiheadAttention`` that has this projection; empty for any other site.
        tied_to: FQNs of other parameters over the same storage.
        head: ``declared`` or ``found``, for the operation that computes the model's output: declared by the
            model or found in the graph. Empty for any other operation.
        router: True if its output decides which experts of a mixture process a token.
        chosen: For a router, the number of experts that process a token; 0 if the graph does not say it.
        all_linear: True if ``target_modules="all-linear"`` includes it.
        quantized: The storage of the weight, if it is quantized. In that case, ``weight_shape`` and
            ``layout`` describe the dequantized values.
        loss: For a head: "chunked" if a loss of its output may be computed in chunks, else the reason why
            not. Empty if that was not checked.
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
    chosen: int = 0
    all_linear: bool = False
    quantized: Quantization | None = None
    loss: str = ""

    @property
    def owner(self) -> str:
        """FQN of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Name of the weight in the module that owns it."""
        return self.weight.rpartition(".")[2]

    @property
    def holder(self) -> str:
        """FQN of the module that holds the factors: the owner, or a child of it for a parameter."""
        if self.parameter == "weight" and self.rows is None:
            return self.owner
        # For a part (``w.0_8``) add the parameter's name: other parameters may have a part of that name.
        part_of_parameter = self.name.rpartition(".")[0] == self.weight != self.owner
        leaf = self.name.split(".")[-2 if part_of_parameter else -1 :]
        return join(self.owner, f"{'_'.join(leaf)}_lora")

    @property
    def opaque(self) -> bool:
        """True if only graphs and a library's layers can read the weight: it is quantized and no stack."""
        return self.quantized is not None and self.quantized.stacked is None

    @property
    def turned(self) -> bool:
        """True if the weight is stored as [out, in] and applied as [in, out]."""
        return self.opaque and self.layout == "in_out"

    @property
    def part_of(self) -> str:
        """The name of :attr:`whole`; empty if there is none."""
        return "" if self.whole is None else self.whole.name

    @property
    def reads_vectors(self) -> bool:
        """True if the input features are the last dimension, or the second-to-last for a left operand."""
        products = {"linear", "matmul", "quantized"}
        return not self.experts and {call.pattern for call in self.calls} <= products

    @property
    def is_layer(self) -> bool:
        """True if the operation multiplies vectors with a whole matrix, as ``nn.Linear`` does."""
        left = any(call.left for call in self.calls)
        whole = self.rows is None and self.view is None
        return self.family == "linear" and self.reads_vectors and whole and not left

    @property
    def place(self) -> str:
        """FQN of the weight, with the rows in brackets if the site covers only some: ``w[0:8]``."""
        return self.weight if self.rows is None else f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of its part with the output features that the site covers."""
        if self.rows is None:
            return self.weight_shape
        rows = self.rows[1] - self.rows[0]
        if self.layout == "in_out":
            return (self.weight_shape[0], rows)
        return (rows, *self.weight_shape[1:])

    @property
    def divisible(self) -> bool:
        """True if some output features of the operation can have a separate adapter."""
        plain = self.family == "linear" and self.rows is None and self.experts is None
        return plain and all(call.axes == (-1,) for call in self.calls)

    def part(self, name: str, rows: tuple[int, int]) -> Site:
        """Return the site of some of the output features.

        Args:
            name: The end of its name, after this site's name.
            rows: Its rows (start, stop).
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
        """Shape in which the weight is applied: its own, or that of a view."""
        return self.view or self.weight_shape

    @property
    def form(self) -> tuple[object, ...]:
        """The way in which the weight is applied. Sites of the same form can share factors."""
        return self.family, self.layout, self.view, self.order, self.experts, self.groups

    def is_like(self, other: Site) -> bool:
        """Return True if another site applies its weight in the same way."""
        return self.form == other.form

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the weight's shape in the applied form: a view if possible, else a copy."""
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

        It is the axis of the experts if the weight has any, else that of the output features. A slice of the
        weight needs the same slice of ``B`` along its first axis. With experts, it also needs that of ``A``.
        """
        return 0 if self.layout == "out_in" or self.experts else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """An operation or a weight that cannot have an adapter, with the reason and a remedy.

    Attributes:
        name: FQN of the weight or module, or the node's name if there is none.
        reason: The reason, and a change that would help.
        region: FQN of the region that contains it.
        node: Name of the node in that region's graph.
    """

    name: str
    reason: str
    region: str = ""
    node: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """Names by which a configuration may select the operation, with and without ``.weight``."""
        return self.name, f"{self.name}.weight"


Match = Site | Rejection | None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Every linear operation of a model, and the refused operations, with reasons."""

    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """Shapes and names of the two factors of a site at some rank.

    Attributes:
        a: Shape of A, rank first.
        b: Shape of B, rank second.
        stacked: True if both have one more axis in front, for experts.
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
        """The number of terms in the sum that computes an output of A, and an output of B."""
        first = 2 if self.stacked else 1
        return math.prod(self.a[first:]), math.prod(self.b[first:])

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return math.prod(self.a) + math.prod(self.b)


class BranchBuilder(Protocol):
    """The object with which a pattern writes the nodes of a branch. The builder tags every node."""

    @property
    def a(self) -> fx.Node:
        """Node of the factor A, in the dtype in which the branch computes."""

    @property
    def b(self) -> fx.Node:
        """Node of the factor B, as the kind computes it for the branch."""

    @property
    def bias(self) -> fx.Node | None:
        """Node of the bias that is added to the product with B, [out], or None.

        If a pattern does not use this bias, the kind adds it to the branch.
        """

    def dropped(self, x: fx.Node) -> fx.Node:
        """Return ``x`` after the adapter's dropout."""

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a ``call_function`` node."""

    def low_rank(self, x: fx.Node, *, with_bias: bool = True) -> fx.Node:
        """Write ``B (A drop(x))``, plus :attr:`bias`, for a product that reads ``x``. A pass can fuse it."""

    def item(self, letter: str, index: int) -> fx.Node:
        """Return one expert's matrix of the factor ``a`` or ``b``."""


class OutputBuilder(BranchBuilder, Protocol):
    """The object with which an adapter kind writes the output of an adapted operation.

    A factor, and a slot (another tensor of the kind), is read once, where it is first used.

    Attributes:
        site: The site, with names relative to its region.
        applied: The call of the site's weight that gets the branch.
        base: The node of the operation without any adapter.
        total: The node of the operation with the previous adapters; ``base`` for the first adapter.
        scale: The number by which the branch is multiplied.
        padding: The number of the operation's output features before and after the site's; None if the site
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
    def input(self) -> fx.Node:
        """The node that the operation multiplies with its weight."""

    @property
    def operands(self) -> tuple[Any, Any, Any]:
        """Input, weight and bias of an operation that has these arguments."""

    @property
    def bias_taken(self) -> bool:
        """True if the pattern has used :attr:`bias` in its branch."""

    def factor(self, letter: str) -> fx.Node:
        """Return A or B in its own dtype and in the shape that the pattern reads (:class:`Factors`)."""

    def stored(self, letter: str) -> fx.Node:
        """Return A or B as stored."""

    def cast_factor(self, letter: str) -> fx.Node:
        """Return A or B in the dtype in which the branch computes."""

    def read_slot(self, name: str, role: Role = Role.FACTOR) -> fx.Node:
        """Return a slot as stored."""

    def cast_slot(self, name: str) -> fx.Node:
        """Return a slot in the dtype in which the branch computes."""

    def spread_slot(self, name: str, outside: float) -> fx.Node:
        """Return a slot in the dtype of the output, shaped to broadcast against it.

        Args:
            name: The slot.
            outside: The value for output features outside the site.
        """

    def read_weight(self, role: Role) -> fx.Node:
        """Return the weight of the site."""

    def other(self, adapter: str) -> tuple[fx.Node, fx.Node, float]:
        """Return A, B and the scale of another adapter at the site, which the kind has to list as read."""

    @property
    def training(self) -> fx.Node:
        """The training mode of the site, as it is at each call."""

    def cast(self, node: fx.Node) -> fx.Node:
        """Return a node in the dtype in which the branch computes."""

    def cast_to_output(self, node: fx.Node) -> fx.Node:
        """Return a node in the dtype of the operation's output."""

    def spread(self, vector: fx.Node) -> fx.Node:
        """Return a vector of the output features, shaped to broadcast against the output."""

    def padded(self, up: fx.Node) -> fx.Node:
        """Return the output of a branch, with zeros for output features outside the site."""

    def of_call(self, target: Any, *args: Any) -> fx.Node:
        """Write a node for all samples of a call, [samples, ...].

        A branch that runs for some samples of a batch reads the rows of these samples.
        """

    def once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        """Return the node that ``make`` writes. ``make`` is called once for each key."""

    def fuse_by(
        self,
        function: Callable[..., Any],
        *more: Any,
        quantized: Callable[..., Any] | None = None,
        rows: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        less: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the function that computes an operation with its branch, if the branch is :meth:`low_rank`.

        Args:
            function: It takes input, weight, bias, A, B and the scale.
            more: Further arguments of the function: nodes and values.
            quantized: The same function for a quantized weight; None if there is none.
            rows: The function that computes the operation with the branches of several adapters, each for
                its own rows, and the same for a quantized weight. They take the arguments of
                :func:`lora_fx.runtime.rows.fused_rows.lora_rows`. None if there are no such functions.
            less: Options with which ``function`` saves less for the backward, and computes more, for
                ``memory="balanced"``.
        """


@runtime_checkable
class Pattern(Protocol):
    """One kind of linear operation: its match in a graph, and its algebra.

    Matching never edits. ``branch`` is the only method that writes into a graph, through a builder.
    """

    @property
    def name(self) -> str:
        """Unique name, kebab-case; shown in the dry run."""

    def match(self, node: fx.Node, region: Region) -> Match:
        """Return the site of a node, a refusal with its reason, or None for another kind of operation."""

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes and names of A and B."""

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write ``x -> dropout -> A -> B`` and return its node; the caller scales and adds."""

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``B A`` in the weight's layout, unscaled, in the factors' dtype.

        For a slice of the rows of B, return that slice of the weight's output axis. For a slice of the
        experts of both factors, return those experts. A grouped convolution is never sliced. See
        :attr:`Site.axis`.
        """

    def flops(self, site: Site, rank: int) -> int:
        """Return the FLOPs of the branch for one token, pixel or index: two for each multiply-add."""


# --- weights in an export -------------------------------------------------------------------------
# With these classes, a weight format describes an exported weight without importing ONNX: its arrays, the
# operator that reads them, and the nodes of the operator.


class OnnxBuilder(Protocol):
    """The builder of the nodes of one product in an ONNX graph."""

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
            name: The operator's name.
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
        """Make the node of the product, which is named after the operation."""

    def ints(self, numbers: Sequence[int]) -> Any:
        """Make a constant of whole numbers."""

    def rank(self, value: Any) -> int:
        """Return the number of dimensions."""

    def same_dtype(self, first: Any, second: Any) -> bool:
        """Return True if two values have the same dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxProduct:
    """A product ``x Wᵀ`` with a quantized weight, for which ONNX nodes are made.

    Attributes:
        x: The input, [..., in].
        arrays: Codes, scales and, if there are any, zero points: values in the graph of the file.
        rows: Rows of the matrix, [out, in].
        columns: Columns of the matrix.
        block: Values that share a scale.
        scheme: The scheme of :class:`lora_fx.ir.Quantization`.
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
        name: Its name in reports.
        nodes: Makes the nodes of a product, and returns their value.
        dequantizes: True if it only computes the values, and a separate node multiplies with them. Its scales
            then keep all their digits, and a block may be a whole row.
    """

    name: str
    nodes: Callable[[OnnxBuilder, OnnxProduct], Any]
    dequantizes: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxWeight:
    """A matrix [out, in] in the form that an operator reads.

    Attributes:
        operator: The operator.
        codes: uint8 or int8, in the shape that the operator needs.
        scales: fp32, one a block.
        zeros: Zero points as the operator reads them; None if all are in the middle of the codes. Zero points
            that are no integers are in fp32 here, and have the dtype of the scales in the file.
        block: Values that share a scale.
        fresh: True if the codes are in new memory, and not in the memory of the weight.
        order: For each column of the codes, its column in the matrix; None if they are in order.
    """

    operator: OnnxOperator
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    fresh: bool = False
    order: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class NoOperator:
    """The reason why a weight cannot be exported in its format.

    Attributes:
        reason: The end of the message, after the weight's name.
        remedy: A remedy; None for the dense export, which is always possible.
    """

    reason: str
    remedy: str | None = None
