"""The values that the passes hand to each other.

The order in which they appear is the order in which data flows::

    nn.Module -> Capture (Regions) -> Sites + Rejections -> Plan -> rewritten nn.Module

Everything here is immutable, except the ``fx.Graph`` of a region, which passes copy before they
edit.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import fx, nn

from lora_fx.config.lora_config import LoraConfig
from lora_fx.formats.weights import Quantization

__all__ = [
    "BranchBuilder",
    "Call",
    "Capture",
    "Factors",
    "Layout",
    "META_KEY",
    "Match",
    "Matches",
    "Pass",
    "PassResult",
    "Pattern",
    "Plan",
    "PlannedSite",
    "PlannedTokens",
    "Region",
    "Rejection",
    "Role",
    "Site",
    "Skipped",
    "Tag",
    "join",
    "module_of",
    "plan_text",
    "relative",
]


def plan_text(plan: Any) -> str:
    """The table of the sites, the totals, and the sections under them.

    Args:
        plan: A :class:`lora_fx.ir.values.Plan`, which is of the layer above.
    """
    lines = [f"captured by {plan.frontend}"]
    lines += [f"  {note}" for note in plan.notes]
    lines += _table(plan.columns, plan.rows())
    total = plan.base_parameters + plan.added_parameters
    share = 100 * plan.trainable_parameters / total if total else 0.0
    lines.append(
        f"{len(plan.sites)} site(s), {plan.trainable_parameters:,} trainable of {total:,} "
        f"parameters ({share:.4f} %)"
    )
    formats = Counter(row.site.quantized for row in plan.sites if row.site.quantized)
    for text, count in Counter(str(one) for one in formats.elements()).items():
        lines.append(f"the base's weight in {text}: {count} site(s)")
    for name, count in (
        ("a trained magnitude (DoRA)", sum(row.dora for row in plan.sites)),
        ("a bias on B (lora_bias)", sum(row.lora_bias for row in plan.sites)),
    ):
        if count:
            lines.append(f"with {name}: {count} site(s)")
    if plan.saved_modules:
        lines.append("trained in full: " + ", ".join(plan.saved_modules))
    for row in plan.tokens:
        whose = f", those of {row.tied}" if row.tied else ""
        lines.append(f"rows trained: {len(row.indices)} of {row.name}{whose}")
    if plan.biases:
        lines.append(f"biases trained: {len(plan.biases)}")
    lines += [f"matched nothing: {target}" for target in plan.unmatched]
    kept = {row.site.weight for row in plan.sites if row.tied}
    tied = [
        (row.name, f"shared with {', '.join(row.site.tied_to)}")
        for row in plan.sites
        if row.site.tied_to and not row.tied and not kept & set(row.site.tied_to)
    ]
    lines += _section("tied weights, untied by a merge", tied)
    lines += _section(
        "tied weights that stay so",
        ((row.name, f"the transposed adapter of {row.tied}") for row in plan.sites if row.tied),
    )
    lines += _section(
        "fused, and a part can be named alone", _fused(row.site for row in plan.sites)
    )
    lines += _section("not selected", ((s.site.name, s.reason) for s in plan.skipped))
    lines += _section("cannot be adapted", ((r.name, r.reason) for r in plan.rejections))
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: tuple[str, ...]) -> str:
        # Names and patterns read from the left, numbers from the right.
        return "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    return [line(columns), "  ".join("-" * w for w in widths), *(line(row) for row in rows)]


def _fused(sites: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """What the outputs of fused weights are cut into, once for each kind of layer."""
    counts = Counter(
        (site.name.rpartition(".")[2], ", ".join(name for name, _ in site.parts))
        for site in sites
        if site.parts
    )
    for (name, parts), count in counts.items():
        yield name, parts + (f" ({count} layers)" if count > 1 else "")


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = [f"  {name}: {reason}" for name, reason in rows]
    return [f"{title} ({len(listed)}):", *listed] if listed else []


META_KEY = "lora_fx"
"""The one key of ``node.meta`` that lora_fx writes; its value is always a :class:`Tag`."""

Layout = Literal["out_in", "in_out"]
"""How a weight is stored: ``[out, in, ...]`` (``nn.Linear``) or ``[in, out]`` (``x @ W``)."""


def join(*parts: str) -> str:
    """Joins fully qualified names, leaving out empty parts (the root is ``""``)."""
    return ".".join(filter(None, parts))


def relative(name: str, region: str) -> str:
    """A fully qualified name as it is inside a region: what :func:`join` puts before it is taken off."""
    return name[len(region) + 1 :] if region else name


def module_of(key: str) -> str:
    """The FQN of the module whose region has a key."""
    return key.partition("(")[0]


class Role(StrEnum):
    """What a node does for an adapter."""

    BASE = "base"
    FACTOR = "factor"
    CAST = "cast"
    DROPOUT = "dropout"
    DOWN = "A"
    UP = "B"
    MAGNITUDE = "magnitude"
    SCALE = "scale"
    PAD = "pad"
    ADD = "add"
    TOKENS = "tokens"
    ROWS = "rows"
    FUSED = "fused"


@dataclasses.dataclass(frozen=True, slots=True)
class Tag:
    """What ``node.meta["lora_fx"]`` holds.

    Attributes:
        weight: The adapted weight, as a name *inside the region*: equal blocks have equal tags.
        role: What the node does.
        adapter: Whose branch it belongs to; empty for the base operation.
    """

    weight: str
    role: Role
    adapter: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A module whose ``forward`` is known as a graph.

    Attributes:
        fqn: Name of the module in the model; ``""`` is the root.
        module: The module itself.
        graph: What its ``forward`` computes. Names in it are relative to ``module``.
        fallback: Whether the module's own forward may stand in for the graph when it is called in
            a way that the graph was not made for. False if that would leave out an adapter.
        form: Which calls the graph is for: the optional arguments that are given, as in ``mask``; empty for
            calls that give none. A module whose code reads weights itself has a graph for each form.
        overlay: Whether the graph was not traced from the module's own forward, which calls the modules
            below and their regions.
    """

    fqn: str
    module: nn.Module
    graph: fx.Graph
    fallback: bool = True
    form: str = ""
    overlay: bool = False

    @classmethod
    def at(cls, key: str, module: nn.Module, graph: fx.Graph, **options: Any) -> Region:
        """The region of a key.

        Args:
            key: The key.
            module: The module.
            graph: The graph.
            options: The other fields.
        """
        fqn, _, form = key.partition("(")
        return cls(fqn, module, graph, form=form.removesuffix(")"), **options)

    @property
    def key(self) -> str:
        """Its name among the regions of a capture: the FQN, and the form in parentheses."""
        return f"{self.fqn}({self.form})" if self.form else self.fqn

    def falls_back(self, sites: Iterable[Site]) -> bool:
        """Whether the own forward may still stand in where branches of some sites are put into the graph.

        It was traced, so that it applies the weight itself, without the branch. Over regions it calls the
        modules, whose regions have the branch, too.
        """
        below = all(any(call.region != self.key for call in site.calls) for site in sites)
        return self.fallback and self.overlay and below

    def tensor(self, node: object) -> torch.Tensor | None:
        """The tensor that a ``get_attr`` node reads, or None if ``node`` is anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value: object = self.module
        for atom in str(node.target).split("."):
            value = getattr(value, atom, None)
        return value if isinstance(value, torch.Tensor) else None

    def parameter(self, node: object) -> nn.Parameter | None:
        """The parameter that a ``get_attr`` node reads, or None."""
        tensor = self.tensor(node)
        return tensor if isinstance(tensor, nn.Parameter) else None

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """The module that a ``call_module`` node calls, or None if ``node`` is anything else."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


@dataclasses.dataclass(frozen=True)
class Capture:
    """A model as graphs, without any change of meaning.

    Attributes:
        model: A copy of the captured model that shares its parameters' storage. Its classes are the
            user's own: the graphs are beside it, in ``regions``.
        regions: The regions by key, parents before children.
        frontend: The front-end that was used: ``symbolic``, ``export`` or ``regions``.
        notes: Why the other front-ends were not used.
        opaque: Modules that have parameters but no graph, with the reason.
        begun: What was traced of some of those before it was given up. It says what their code does
            first; it never runs.
    """

    model: nn.Module
    regions: Mapping[str, Region]
    frontend: str
    notes: tuple[str, ...] = ()
    opaque: Mapping[str, str] = dataclasses.field(default_factory=dict)
    begun: Mapping[str, fx.Graph] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"captured by {self.frontend}: {len(self.regions)} region(s)"]
        lines += [
            f"  {name or '(root)'}: {len(region.graph.nodes)} nodes"
            for name, region in self.regions.items()
        ]
        lines += [
            f"  no graph: {name or '(root)'}: {reason}" for name, reason in self.opaque.items()
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


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
        part_of: Name of the site of which this is such a part: the operation applies the whole weight.
        tied_to: FQNs of other parameters over the same storage.
        head: Where it makes the model's output: ``declared`` by the model or ``found`` in the
            graph; empty for any other operation.
        quantized: How the weight is stored, where that is in few bits; ``weight_shape`` and ``layout`` are
            those of its values.
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
    part_of: str = ""
    tied_to: tuple[str, ...] = ()
    head: Literal["", "declared", "found"] = ""
    quantized: Quantization | None = None

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
        return join(self.owner, f"{self.name.rpartition('.')[2]}_lora")

    @property
    def place(self) -> str:
        """The weight, and which rows of it."""
        return self.weight if self.rows is None else f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of the rows of it that this is."""
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
            part_of=self.name,
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
        """What :meth:`applied` gives, back in the weight's shape."""
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
    """An operation or a weight that cannot have an adapter, and why, in words that help.

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


Match = Site | Rejection | None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Every linear operation of a model, and what comes close with the reason why it is none."""

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
        """How many inputs an output of A, and one of B, is a sum of."""
        first = 2 if self.stacked else 1
        return _product(self.a[first:]), _product(self.b[first:])

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return _product(self.a) + _product(self.b)


class BranchBuilder(Protocol):
    """What a pattern gets to write a branch with: every node it makes is tagged."""

    @property
    def a(self) -> fx.Node:
        """A, in the dtype in which the branch computes."""

    @property
    def b(self) -> fx.Node:
        """B."""

    @property
    def bias(self) -> fx.Node | None:
        """What the operation that applies B takes for its bias, [out], or None.

        A pattern that does not ask for it has it added to its branch.
        """

    def dropped(self, x: fx.Node) -> fx.Node:
        """``x`` after the adapter's dropout."""

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node."""

    def item(self, letter: str, index: int) -> fx.Node:
        """One expert's matrix of the factor ``a`` or ``b``."""


@runtime_checkable
class Pattern(Protocol):
    """One kind of linear operation: how to find it and what its algebra is.

    Matching never edits. ``branch`` is the only method that writes into a graph, through a builder.
    """

    @property
    def name(self) -> str:
        """Unique name, kebab-case; shown in the dry run."""

    def match(self, node: fx.Node, region: Region) -> Match:
        """A site, a refusal with its reason, or None: not mine."""

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


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedSite:
    """A selected site and what it gets.

    Attributes:
        site: The operation.
        rank, alpha, scale, dropout: The adapter's hyperparameters here.
        parameters: Trainable elements added.
        flops: Extra forward FLOPs for one token.
        tied: Name of the site whose factors it has, transposed; empty for factors of its own.
        saved: Bytes saved for backward for one token, beyond what the frozen model saves: the
            input, the masked input with its mask if there is dropout, the rank-r activation, and for
            DoRA the output where the gradient of the magnitude is worked out from it.
        dora: Whether it has a trained magnitude (arXiv:2402.09353).
        lora_bias: Whether B has a trained bias.
    """

    site: Site
    rank: int
    alpha: float
    scale: float
    dropout: float
    parameters: int
    flops: int
    saved: int
    tied: str = ""
    dora: bool = False
    lora_bias: bool = False

    @property
    def name(self) -> str:
        """FQN of the site."""
        return self.site.name


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTokens:
    """Rows of an embedding, or of a head, that are trained each as a whole.

    Attributes:
        site: The lookup, or the product that makes a value for every token.
        indices: Which rows, in the order in which they are stored.
        tied: Name of the embedding whose rows they are, for a head that shares its weight; else empty.
    """

    site: Site
    indices: tuple[int, ...]
    tied: str = ""

    @property
    def name(self) -> str:
        """FQN of the site."""
        return self.site.name

    @property
    def lookup(self) -> bool:
        """Whether it is a lookup: a product otherwise."""
        return self.site.family == "embedding"

    @property
    def parameters(self) -> int:
        """Trainable elements added."""
        return 0 if self.tied else len(self.indices) * self.site.weight_shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A linear operation that the configuration does not select, and why."""

    site: Site
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The dry run: what ``rewrite`` would do, and why.

    ``str(plan)`` is a table; ``plan.to_json()`` has everything in it.

    Attributes:
        sites: What is adapted.
        skipped: Linear operations that are not selected, with the reason.
        rejections: Operations that cannot be adapted, with the reason.
        unmatched: Entries of the configuration that selected nothing.
        saved_modules: Modules trained in full (``modules_to_save``).
        biases: FQNs of the biases that are trained.
        config: The configuration.
        frontend: The front-end that captured the model.
        notes: Why the other front-ends were not used.
        base_parameters: Elements of the model's own parameters, shared ones once.
        extra_parameters: Trainable elements outside the adapters (biases, ``modules_to_save``).
        tokens: Rows of embeddings that are trained (``trainable_token_indices``).
    """

    sites: tuple[PlannedSite, ...]
    skipped: tuple[Skipped, ...]
    rejections: tuple[Rejection, ...]
    unmatched: tuple[str, ...]
    config: LoraConfig
    frontend: str
    notes: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    base_parameters: int = 0
    extra_parameters: int = 0
    tokens: tuple[PlannedTokens, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """What an optimizer would get, in elements."""
        return self.added_parameters + self.extra_parameters

    @property
    def added_parameters(self) -> int:
        """What the model has more than before, in elements: factors, and trained rows."""
        return sum(row.parameters for row in self.sites) + sum(
            row.parameters for row in self.tokens
        )

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {
            "frontend": self.frontend,
            "notes": list(self.notes),
            "trainable_parameters": self.trainable_parameters,
            "base_parameters": self.base_parameters,
            "sites": [_site_dict(row) for row in self.sites],
            "skipped": [
                {"name": s.site.name, "pattern": s.site.pattern, "reason": s.reason}
                for s in self.skipped
            ],
            "rejections": [dataclasses.asdict(r) for r in self.rejections],
            "unmatched": list(self.unmatched),
            "modules_to_save": list(self.saved_modules),
            "biases": list(self.biases),
            "tokens": {row.name: list(row.indices) for row in self.tokens},
            "config": self.config.to_dict(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def rows(self) -> list[tuple[str, ...]]:
        """The table of ``str(plan)`` as cells, under :attr:`columns`."""
        return [
            (
                row.site.name,
                row.site.pattern + (f" x{len(row.site.calls)}" if len(row.site.calls) > 1 else ""),
                _stored(row.site),
                str(row.rank),
                f"{row.scale:g}",
                f"{row.parameters:,}",
                f"{row.flops:,}",
                f"{row.saved:,}",
            )
            for row in self.sites
        ]

    columns: ClassVar[tuple[str, ...]] = (
        "site",
        "pattern",
        "weight",
        "r",
        "scale",
        "trainable",
        "FLOPs/token",
        "saved B/token",
    )

    def __str__(self) -> str:
        return plan_text(self)


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns.

    Attributes:
        capture: The result; the argument itself if nothing was modified.
        modified: Whether anything was, true to fact.
    """

    capture: Capture
    modified: bool


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options; calling it runs it.

    It never edits the graphs of its input. The model of the capture is the pipeline's own: passes
    add to it.
    """

    name: ClassVar[str]

    def __call__(self, capture: Capture) -> PassResult:
        """Runs the pass."""


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _stored(site: Site) -> str:
    """The shape of the weight, and the format where it has one."""
    shape = "x".join(str(size) for size in site.shape)
    return shape if site.quantized is None else f"{shape} {site.quantized.scheme}"


def _site_dict(row: PlannedSite) -> dict[str, Any]:
    site = dataclasses.asdict(row.site)
    if row.site.quantized is not None:
        site["quantized"]["dtype"] = str(row.site.quantized.dtype).removeprefix("torch.")
    rest = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "site"}
    return {**site, **rest}
