"""Captures and regions, the tags of nodes that passes add, and the contract of a pass."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, TypeVar

import torch
from torch import fx, nn

from lora_fx.ir.tables import html_block, html_folded, html_lines

if TYPE_CHECKING:
    from lora_fx.ir.plan import Plan
    from lora_fx.ir.site import Matches, Site

__all__ = [
    "BASE_READ",
    "META_KEY",
    "Capture",
    "FusedBranch",
    "Kind",
    "ModelT",
    "Pass",
    "PassResult",
    "Region",
    "Role",
    "Tag",
    "adapters_of",
    "join",
    "relative",
    "role_of",
    "sums_on",
    "tag_of",
]

ModelT = TypeVar("ModelT", bound=nn.Module)
"""The class of a user's model: functions such as ``rewrite`` return a model of the same class."""

META_KEY = "lora_fx"
"""The key of ``node.meta`` with which passes mark nodes; its value is always a :class:`Tag`."""


BASE_READ: Final = "lora_fx_base"
"""Key in the ``meta`` of a node that reads an adapted weight for the base operation, not for a branch."""


def join(*parts: str) -> str:
    """Join fully qualified names, leaving out empty parts (the root is ``""``)."""
    return ".".join(filter(None, parts))


def relative(name: str, region: str) -> str:
    """Return a fully qualified name relative to a region, the inverse of :func:`join`."""
    return name[len(region) + 1 :] if region else name


class Role(StrEnum):
    """The purpose of a node in an adapter."""

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
class FusedBranch:
    """A function that computes an operation together with its branch.

    The fields refer to nodes by name, so that they stay valid for a copy of the graph.

    Attributes:
        function: It takes input, weight, bias, A, B, the scale and ``more``.
        quantized: The same function for a quantized weight; None if there is none.
        a, b: The names of the nodes of A and B, in their own dtypes.
        scale: The number by which the branch is multiplied.
        more: Further arguments: names of nodes, and values.
        dropout: The names of the nodes of the dropout probability and of the flag that enables dropout; None
            for no dropout.
        padding: The number of output features before and after those of the branch; None if it has all.
        rows: The functions, plain and over a quantized weight, that compute the operation with the branches
            of several adapters, each for its own rows; None if no function does.
        first: True if no node comes between the operation and the branch.
        less: Options of the function with which it saves less for the backward, and computes more.
        deploy: The storage that the adapted weight is trained for; None for no rounding.
    """

    function: Callable[..., Any]
    quantized: Callable[..., Any] | None
    a: str
    b: str
    scale: float
    more: tuple[Any, ...] = ()
    dropout: tuple[str, str] | None = None
    padding: tuple[int, int] | None = None
    rows: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    first: bool = True
    less: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deploy: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tag:
    """The value of ``node.meta["lora_fx"]``.

    Attributes:
        weight: The adapted weight, as a name *inside the region*: equal blocks have equal tags.
        role: The purpose of the node.
        adapter: The adapter of the branch; empty for the base operation.
        fused: For the node that adds a branch to an operation: the function that computes both. None for
            other nodes, and if there is no such function.
    """

    weight: str
    role: Role
    adapter: str = ""
    fused: FusedBranch | None = dataclasses.field(default=None, compare=False, repr=False)


def tag_of(node: fx.Node) -> Tag | None:
    """Return the tag that a pass has set on a node, or None."""
    tag = node.meta.get(META_KEY)
    return tag if isinstance(tag, Tag) else None


def role_of(node: fx.Node) -> Role | None:
    """Return the purpose of a node in an adapter; None if the node is not part of an adapter."""
    tag = tag_of(node)
    return None if tag is None else tag.role


def adapters_of(graph: fx.Graph) -> list[tuple[str, str]]:
    """Return the adapters of a graph as pairs of weight and adapter name, each once."""
    tags = map(tag_of, graph.nodes)
    return list(dict.fromkeys((t.weight, t.adapter) for t in tags if t is not None and t.adapter))


def sums_on(base: fx.Node) -> list[fx.Node]:
    """Return the nodes at which branches are added to the output of an operation, in order."""
    sums: list[fx.Node] = []
    total: fx.Node | None = base
    while total is not None:
        adding = (
            user for user in total.users if role_of(user) is Role.ADD and user.args[0] is total
        )
        total = next(adding, None)
        sums += [] if total is None else [total]
    return sums


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A module whose ``forward`` is known as a graph.

    Attributes:
        fqn: Name of the module in the model; ``""`` is the root.
        module: The module itself.
        graph: The graph of its ``forward``. Names in it are relative to ``module``.
        fallback: True if the module's own forward runs in calls that the graph does not cover. False if that
            forward cannot read a weight in its format.
        not_run: The reason why the graph only lists operations and never runs; empty if it may run.
        written_out: True if the graph was traced from code that lora_fx has instead of the module's forward.
        edited: True if a pass has changed the graph since the capture: only such a graph is installed.
    """

    fqn: str
    module: nn.Module
    graph: fx.Graph
    fallback: bool = True
    not_run: str = ""
    written_out: bool = False
    edited: bool = False

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Region:
        """Return the same region with an edited graph.

        Args:
            graph: The graph.
            changes: Other fields that change.
        """
        return dataclasses.replace(self, graph=graph, edited=True, **changes)

    def falls_back(self, sites: Iterable[Site]) -> bool:
        """Return True if the module's own forward still is a fallback after these sites get branches.

        The forward reads each weight with its adapters applied. It is no fallback if a library has packed a
        weight.
        """
        return self.fallback and not any(site.opaque for site in sites)

    def tensor(self, node: object) -> torch.Tensor | None:
        """Return the tensor that a ``get_attr`` node reads, or None if ``node`` is anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, leaf = str(node.target).rpartition(".")
        module: Any = self.module
        for atom in owner.split(".") if owner else ():
            module = getattr(module, atom, None)
        value = getattr(module, leaf, None)
        return value if isinstance(value, torch.Tensor) else None

    def parameter(self, node: object) -> nn.Parameter | None:
        """Return the parameter that a ``get_attr`` node reads, or None."""
        tensor = self.tensor(node)
        return tensor if isinstance(tensor, nn.Parameter) else None

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a ``call_module`` node calls, or None if ``node`` is anything else."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


@dataclasses.dataclass(frozen=True, repr=False)
class Capture:
    """A model as graphs that compute the same as its code.

    Attributes:
        model: A copy of the captured model that shares its parameters' storage. Its classes are the user's
            own: the graphs are in ``regions``, not in the model.
        regions: The regions by key, parents before children.
        frontend: The front-end that was used: ``symbolic``, ``export`` or ``regions``.
        notes: Reasons why other front-ends were not used.
        opaque: Modules that have parameters but no graph, with the reason.
        begun: Partial graphs of some of those modules, up to the point where tracing failed. They show the
            first operations and never run.
        matches: The linear operations, once they are matched.
        plan: The plan for adapting them, once it is made.
    """

    model: nn.Module
    regions: Mapping[str, Region]
    frontend: str
    notes: tuple[str, ...] = ()
    opaque: Mapping[str, str] = dataclasses.field(default_factory=dict)
    begun: Mapping[str, fx.Graph] = dataclasses.field(default_factory=dict)
    matches: Matches | None = None
    plan: Plan | None = None

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return (
            f"<Capture of {name} by {self.frontend}: {len(self.regions)} region(s), {len(self.opaque)} "
            "module(s) without a graph; print it for each>"
        )

    def _repr_html_(self) -> str:
        regions = [
            (key or "(root)", str(len(region.graph.nodes))) for key, region in self.regions.items()
        ]
        opaque = [(name or "(root)", reason) for name, reason in self.opaque.items()]
        table = html_folded(("region", "nodes"), regions, left=2)
        blocks = html_block(f"regions ({len(regions)})", table, opened=True)
        if opaque:
            table = html_folded(("module", "because"), opaque)
            blocks += html_block(f"without a graph ({len(opaque)})", table)
        head = html_lines([f"{type(self.model).__name__}, captured by {self.frontend}"])
        return f"<div>{head}{blocks}{html_lines(self.notes)}</div>"

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


Kind: TypeAlias = Literal["functional", "in place"]


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """The result of a pass.

    Attributes:
        capture: The new capture; the argument itself if nothing was modified.
        modified: True only if something was modified.
    """

    capture: Capture
    modified: bool

    @classmethod
    def of(cls, capture: Capture, **fields: Any) -> PassResult:
        """Return the result of a pass that sets fields of a capture.

        The capture is unmodified if the fields have these values already.
        """
        if all(getattr(capture, name) == value for name, value in fields.items()):
            return cls(capture, False)
        return cls(dataclasses.replace(capture, **fields), True)


class Pass(abc.ABC):
    """A step of a rewrite: a frozen dataclass whose fields are its options. Calling it runs the step.

    A functional pass returns a new capture and does not change its argument. A pass that works in place
    edits the model of the capture, which is the pipeline's own copy, and returns its argument. Running a
    pass a second time modifies nothing. :func:`lora_fx.passes.pipeline.run_passes` enforces all of this.

    Attributes:
        name: Its name in errors, logs and on the command line, in kebab case.
        kind: Either functional or in place.
        needs: The field that the capture must have, ``matches`` or ``plan``, unless the pass was created with
            ``rows``; empty for none.
    """

    kind: ClassVar[Kind] = "functional"
    needs: ClassVar[str] = ""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the pass. Most passes define it on their class."""

    def requires(self, capture: Capture) -> str | None:
        """Return what the capture lacks for the pass to run; None if nothing. This must be cheap."""
        has_rows = getattr(self, "rows", None) is not None
        if not self.needs or has_rows or getattr(capture, self.needs) is not None:
            return None
        return "nothing is planned" if self.needs == "plan" else "no operations were looked for"

    def ensures(self, before: Capture, after: Capture) -> str | None:
        """Check the result of the pass. Return the error, or None if the result is right.

        This must be cheap.
        """
        return None

    @abc.abstractmethod
    def __call__(self, capture: Capture) -> PassResult:
        """Run the pass."""
