"""Pass that inserts the canonical branch at every planned site: ``x -> dropout -> A -> B -> scale -> add``.

The adapter kind may add or replace nodes between A, B and the sum.

If an operation already has the branch of another adapter, the new branch is added to the sum of the two.

Graphs are copied before they are edited. The factors that a branch reads exist already
(:mod:`lora_fx.passes.insert.add_factors`), so the model itself is not changed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import (
    BASE_READ,
    META_KEY,
    Call,
    Capture,
    Deployment,
    FusedBranch,
    Pass,
    PassResult,
    PlannedSite,
    Region,
    Role,
    Site,
    Tag,
    join,
    relative,
    sums_on,
    tag_of,
)
from lora_fx.kinds import kind_of
from lora_fx.passes.graph import arguments, copy_graph
from lora_fx.passes.parameters import (
    DROPOUT,
    adapter_dtype,
    factor_names,
    is_sharded,
    other_rows,
    weight_at,
)
from lora_fx.passes.patterns import path_to_weight, pattern_of
from lora_fx.runtime.kernels import branch
from lora_fx.runtime.modules import parts

__all__ = ["Branch", "Insert", "See", "Writer", "observed", "read_base"]


@dataclasses.dataclass(frozen=True)
class _Wiring:
    """Description of a branch, with names relative to the region.

    Attributes:
        site: The site, with names relative to the region.
        call: The call that applies its weight.
        a, b: Names of the factors; empty for a kind without factors.
        kind: Name of the adapter kind.
        options: Options of the adapter kind; None if it has none.
        slots: The tensors of the kind besides A and B: pairs of slot name and name in the region.
        scale: The number by which the result of the branch is multiplied.
        dropout: The module with the dropout probability and the training mode; empty for none.
        cast: True to cast the factors to the dtype of the base output, and to shard them like it.
        in_parts: True if the weight is sharded over processes.
        transposed: True if the factors are stored transposed.
        padding: Numbers of output features of the base operation before and after the features of the
            branch; None if the branch has all features.
        deploy: The storage that the adapted weight is trained for; None for no rounding.
        reads: Other adapters that the kind reads: their names, the names of their factors, their scales.
    """

    site: Site
    call: Call
    a: str
    b: str
    kind: str = "lora"
    options: Mapping[str, Any] | None = None
    slots: tuple[tuple[str, str], ...] = ()
    scale: float = 1.0
    dropout: str = ""
    cast: bool = False
    in_parts: bool = False
    transposed: bool = False
    padding: tuple[int, int] | None = None
    deploy: Deployment | None = None
    reads: tuple[tuple[str, str, str, float], ...] = ()


class Writer:
    """Writer that adds tagged nodes to a graph, right after a certain node.

    Attributes:
        made: The nodes written so far.
    """

    def __init__(self, graph: fx.Graph, after: fx.Node, tag: Callable[[Role], Tag]) -> None:
        self._graph, self._next, self._tag = graph, after.next, tag
        self.made: list[fx.Node] = []

    def make(self, role: Role, op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node with any op, and tag it with its role in the branch."""
        with self._graph.inserting_before(self._next):
            node = self._graph.create_node(op, target, args, kwargs)
        node.meta[META_KEY] = self._tag(role)
        node.meta[BASE_READ] = True
        self.made.append(node)
        return node

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a ``call_function`` node, and tag it with its role in the branch."""
        return self.make(role, "call_function", target, *args, **kwargs)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replace `old` by `new` in all nodes except those of this writer."""
        mine = set(self.made)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in mine)


class Branch(Writer):
    """Writer of one adapter's branch, right after the node that it is added to.

    Patterns write the branch with it, and adapter kinds join it with the output
    (:class:`lora_fx.ir.OutputBuilder`). A factor is read right before its first use.
    """

    def __init__(
        self,
        graph: fx.Graph,
        base: fx.Node,
        tag: Callable[[Role], Tag],
        wiring: _Wiring,
        items: dict[str, fx.Node] | None = None,
    ) -> None:
        # The total is the sum of the operation and its branches so far. The rest of the graph reads it.
        self.base, self.total = base, [base, *sums_on(base)][-1]
        super().__init__(graph, self.total, tag)
        self._wiring = wiring
        self.site, self.applied = wiring.site, wiring.call
        self.scale, self.padding = wiring.scale, wiring.padding
        self._names = {"a": wiring.a, "b": wiring.b}
        self._kind = kind_of(wiring)
        self._slots = dict(wiring.slots)
        self._others = {name: (a, b, scale) for name, a, b, scale in wiring.reads}
        self._known: dict[str, fx.Node] = {}
        self._items = {} if items is None else items
        self._dropout: tuple[str, str] | None = None
        self._low_rank = False
        self._fused: FusedBranch | None = None
        base.meta[META_KEY] = tag(Role.BASE)

    @property
    def a(self) -> fx.Node:
        """Return A, in the dtype in which the branch computes."""
        return self.once("a", lambda: self.cast_factor("a"))

    @property
    def b(self) -> fx.Node:
        """Return B as the adapter kind writes it for the product, in the dtype of the branch."""
        return self.once("b", lambda: self._kind.factor_b(self))

    @property
    def bias(self) -> fx.Node | None:
        """Return the bias that the kind adds to the product with B, or None."""
        if "bias" not in self._known:
            bias = self._kind.branch_bias(self)
            if bias is None:
                return None
            self._known["bias"] = bias
        return self._known["bias"]

    @property
    def bias_taken(self) -> bool:
        """Return True if the pattern has added :attr:`bias`, so that the kind need not add it."""
        return "bias" in self._known

    @property
    def operand_bias(self) -> fx.Node:
        """Return the bias node of the base operation."""
        names = {node.name: node for node in self.base.all_input_nodes}
        return names[self.applied.bias]

    @property
    def input(self) -> fx.Node:
        """Return the node that the operation multiplies with its weight."""
        names: dict[str, fx.Node] = {node.name: node for node in self._graph.nodes}
        return names[self.applied.input]

    @property
    def operands(self) -> tuple[Any, Any, Any]:
        """Return input, weight and bias of a linear operation."""
        named = arguments(self.base, "input weight bias=None")
        return named["input"], named["weight"], named["bias"]

    def item(self, letter: str, index: int) -> fx.Node:
        """Return one expert's matrix of a factor.

        All branches of a graph use one ``unbind``. If each expert indexed the factor instead, each index
        operation would have a gradient as large as the whole factor.
        """
        name = self._names[letter]
        if name not in self._items:
            factor = self.a if letter == "a" else self.b
            self._items[name] = self.call(Role.FACTOR, torch.unbind, factor)
        return self.call(Role.FACTOR, operator.getitem, self._items[name], index)

    def dropped(self, x: fx.Node) -> fx.Node:
        """Return ``x`` after dropout, or ``x`` itself if the site has none.

        The graph reads the dropout probability and the training mode at each call.
        """
        dropout = self._wiring.dropout
        if not dropout:
            return x
        p, training = (self._read(join(dropout, name), Role.DROPOUT) for name in ("p", "training"))
        self._dropout = p.name, training.name
        return self.call(Role.DROPOUT, F.dropout, x, p, training)

    def low_rank(self, x: fx.Node, *, with_bias: bool = True) -> fx.Node:
        """Return ``B (A drop(x))`` for a product that reads ``x``, with :attr:`bias` if `with_bias`."""
        self._low_rank = True
        down = self.call(Role.DOWN, F.linear, self.dropped(x), self.a)
        bias = self.bias if with_bias else None
        return self.call(Role.UP, F.linear, down, self.b, *(() if bias is None else (bias,)))

    def fuse_by(
        self,
        function: Callable[..., Any],
        *more: Any,
        quantized: Callable[..., Any] | None = None,
        rows: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        less: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the function that can replace the operation and its branch.

        See :class:`lora_fx.ir.FusedBranch` for the arguments. Nothing is recorded for a branch that was
        written without :meth:`low_rank`.
        """
        if not self._low_rank:
            return
        self._fused = FusedBranch(
            function,
            quantized,
            self.factor("a").name,
            self.factor("b").name,
            self.scale,
            tuple(value.name if isinstance(value, fx.Node) else value for value in more),
            self._dropout,
            self.padding,
            rows,
            self.total is self.base,
            less or {},
            self._wiring.deploy,
        )

    def finish(self, up: fx.Node | None) -> fx.Node:
        """Let the kind join the branch with the output, and replace the output by the result.

        Args:
            up: The output node of the pattern's branch; None for a kind without factors.
        """
        total = self._kind.joined(self, up)
        total.meta[META_KEY] = dataclasses.replace(self._tag(Role.ADD), fused=self._fused)
        self.replace(self.total, total)
        return total

    def factor(self, letter: str) -> fx.Node:
        """Return a factor as the pattern reads it, in the dtype in which it is stored."""
        return self.once(f"factor {letter}", lambda: self._new_factor(letter))

    def _new_factor(self, letter: str) -> fx.Node:
        stored = self.stored(letter)
        if self._wiring.transposed:
            stored = self.call(Role.FACTOR, torch.t, stored)
        return self._kind.factor(self, letter, stored)

    def stored(self, letter: str) -> fx.Node:
        """Return the node that reads a factor, as it is stored."""
        return self._read(self._names[letter])

    def cast_factor(self, letter: str) -> fx.Node:
        """Return a factor in the dtype in which the branch computes."""
        # Cast the factors, which are small, and never the activation.
        return self.cast(self.factor(letter))

    def read_slot(self, name: str, role: Role = Role.FACTOR) -> fx.Node:
        """Return the node that reads a slot of the kind, as it is stored."""
        return self._read(self._slots[name], role)

    def cast_slot(self, name: str) -> fx.Node:
        """Return a slot in the dtype in which the branch computes."""
        return self.once(f"cast {name}", lambda: self._new_cast_slot(name))

    def _new_cast_slot(self, name: str) -> fx.Node:
        if not (self._wiring.in_parts and self._kind.low_rank):
            return self.cast(self.read_slot(name))
        slot, a = self.read_slot(name), self.factor("a")
        return self.call(Role.CAST, parts.slot_beside, slot, a, self.base)

    def spread_slot(self, name: str, outside: float) -> fx.Node:
        """Return a slot with a value for each output feature, reshaped to broadcast over the output.

        If the site is a part of a weight, the output features of the other parts get the value `outside`.
        """
        vector, padding = self.cast_slot(name), self.padding
        if padding is not None:
            vector = self.call(Role.PAD, F.pad, vector, padding, "constant", outside)
        return self.spread(vector)

    def read_weight(self, role: Role) -> fx.Node:
        """Write and return a node that reads the weight of the site."""
        return self.make(role, "get_attr", self.site.weight)

    def other(self, adapter: str) -> tuple[fx.Node, fx.Node, float]:
        """Return A, B and the scale of another adapter at the site, as stored."""
        a, b, scale = self._others[adapter]
        return self._read(a), self._read(b), scale

    def cast_to_output(self, node: fx.Node) -> fx.Node:
        """Write and return a cast of a node to the dtype of the operation's output."""
        return self.call(Role.CAST, branch.cast_like, node, self.base)

    @property
    def training(self) -> fx.Node:
        """Return the training mode of the site's holder, which is read at each call."""
        holder = self._names["a"] or next(iter(self._slots.values()))
        return self._read(join(holder.rpartition(".")[0], "training"), Role.DROPOUT)

    def cast(self, node: fx.Node) -> fx.Node:
        """Return a node cast to the dtype of the operation's output, or the node if no cast is needed."""
        return (
            self.call(Role.CAST, branch.cast_like, node, self.base) if self._wiring.cast else node
        )

    def padded(self, up: fx.Node) -> fx.Node:
        """Return a branch's output, padded with zeros for output features that are not part of the site."""
        if self.padding is None:
            return up
        return self.call(Role.PAD, branch.pad_features, up, *self.padding)

    def spread(self, vector: fx.Node) -> fx.Node:
        """Return a vector with a value for each output feature, reshaped to broadcast over the output."""
        call = self.applied
        if call.axes == (-1,):
            return vector
        operands = (vector, self.base, call.axes, call.sizes)
        return self.once(
            f"spread {vector.name}", lambda: self.call(Role.MAGNITUDE, branch.spread, *operands)
        )

    def of_call(self, target: Any, *args: Any) -> fx.Node:
        """Write a node for all samples of a call, [samples, ...].

        The node has no tag, so :mod:`lora_fx.passes.insert.select_rows` does not restrict it to rows.
        """
        node = self.call(Role.ROWS, target, *args)
        del node.meta[META_KEY]
        return node

    def once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        """Return the node stored under a key. The first request for a key writes the node with ``make``."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _read(self, name: str, role: Role = Role.FACTOR) -> fx.Node:
        return self.once(name, lambda: self.make(role, "get_attr", name))


@dataclasses.dataclass(frozen=True)
class Insert(Pass):
    """Pass that adds the branch of an adapter to each operation of the plan.

    Attributes:
        rows: The planned sites; None for those of the capture's plan.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "insert"
    needs: ClassVar[str] = "plan"
    rows: tuple[PlannedSite, ...] | None = None
    adapter: str = "default"

    def __call__(self, capture: Capture) -> PassResult:
        """Add the planned branches that are not in the graphs yet."""
        planned = self.rows
        if planned is None:
            assert capture.plan is not None
            planned = capture.plan.sites
        missing = _missing(planned, capture.regions, self.adapter)
        if not missing:
            return PassResult(capture, False)
        regions = dict(capture.regions)
        known: dict[Any, fx.Graph] = {}
        for name, work in missing.items():
            region = regions[name]
            jobs = tuple(self._job(capture, region, row, index) for row, index in work)
            # Equal layers share their graph before and after the pass.
            key = (id(region.graph), jobs)
            if key not in known:
                known[key] = self._edited(region, jobs)
            safe = region.falls_back(row.site for row, _ in work)
            regions[name] = region.with_graph(known[key], fallback=safe)
        return PassResult(dataclasses.replace(capture, regions=regions), True)

    def _job(self, capture: Capture, region: Region, row: PlannedSite, index: int) -> _Job:
        site, call = row.site, row.site.calls[index]
        weight = weight_at(capture.model, site.weight)
        names = factor_names(row)
        holder = relative(site.holder, region.fqn)
        kind = kind_of(row)
        if site.bias and not call.bias:
            kind = kind.without_bias()

        def factor(name: str) -> str:
            return join(holder, name, self.adapter) if name else ""

        wiring = _Wiring(
            site=_local(site, region.fqn),
            call=dataclasses.replace(call, region=""),
            a=factor(names.a),
            b=factor(names.b),
            kind=kind.name,
            options=kind.options,
            slots=tuple((name, factor(name)) for name in names.slots),
            scale=row.scale,
            dropout=factor(DROPOUT) if row.dropout else "",
            cast=adapter_dtype(weight) != weight.dtype or call.cast or is_sharded(weight),
            in_parts=is_sharded(weight),
            transposed=bool(row.tied),
            padding=_padding(site),
            deploy=row.deploy,
            reads=tuple(
                (name, join(holder, own.a, name), join(holder, own.b, name), other.scale)
                for name, other in other_rows(capture.model, row)
                for own in [factor_names(other)]
            ),
        )
        return _Job(relative(site.place, region.fqn), wiring)

    def _edited(self, region: Region, jobs: tuple[_Job, ...]) -> fx.Graph:
        graph = copy_graph(region.graph)
        nodes = {node.name: node for node in graph.nodes}
        edited = region.with_graph(graph)
        items: dict[str, fx.Node] = {}
        for job in jobs:
            wiring = job.wiring
            base = nodes[wiring.call.output]
            read_base(edited, base, wiring.site.weight)
            tag = functools.partial(_tag, job.part, self.adapter)
            build = Branch(graph, base, tag, wiring, items)
            pattern = pattern_of(wiring.call)
            kind = kind_of(wiring)
            build.finish(kind.branch(pattern, base, edited, build) if kind.low_rank else None)
        graph.lint()
        return graph


def read_base(region: Region, operation: fx.Node, weight: str) -> None:
    """Make an operation read the unadapted weight. Other readers of the weight get the adapted one."""
    graph = region.graph
    paths = {value: path_to_weight(value, region) for value in operation.all_input_nodes}
    paths = {value: path for value, path in paths.items() if path and path[-1].target == weight}
    if not paths:
        # The path to the weight is unknown, so every read in the graph must be of the base.
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == weight:
                node.meta[BASE_READ] = True
    for value, path in paths.items():
        if BASE_READ in path[-1].meta:
            continue
        if all(len(node.users) == 1 for node in path):
            path[-1].meta[BASE_READ] = True
            continue
        with graph.inserting_before(operation):
            operation.replace_input_with(value, _copy_of(graph, path))
        for node in path:
            if not node.users:
                graph.erase_node(node)


def _copy_of(graph: fx.Graph, path: tuple[fx.Node, ...]) -> fx.Node:
    """Copy the nodes from an operand back to the weight that it is computed from. Return the copied operand.

    The last node of the path reads the weight, and its copy reads the unadapted weight.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for node in reversed(path):
        copies[node] = graph.node_copy(node, lambda old: copies.get(old, old))
    copies[path[-1]].meta[BASE_READ] = True
    return copies[path[0]]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One branch to write. Its names are relative to the region, so that equal layers have equal jobs.

    Equal jobs on equal graphs give equal graphs.
    """

    part: str
    wiring: _Wiring


def _padding(site: Site) -> tuple[int, int] | None:
    """Return the numbers of output features before and after those of a part, or None for a whole site."""
    if not site.part_of or site.rows is None:
        return None
    return site.rows[0], site.applied_shape[site.axis] - site.rows[1]


def _local(site: Site, region: str) -> Site:
    """Return the site with names relative to its region, so that equal layers have equal sites."""
    return dataclasses.replace(
        site,
        name=relative(site.name, region),
        weight=relative(site.weight, region),
        bias=relative(site.bias, region) if site.bias else None,
        calls=(),
        tied_to=(),
        parts=(),
        whole=None,
        attention="",
        head="",
    )


def _tag(part: str, adapter: str, role: Role) -> Tag:
    return Tag(part, role, "" if role is Role.BASE else adapter)


def _missing(
    rows: Iterable[PlannedSite], regions: Mapping[str, Region], adapter: str
) -> dict[str, list[tuple[PlannedSite, int]]]:
    """Return the branches that the graphs lack, as planned sites with the index of a call, by region.

    A call is skipped if its region no longer exists, or if its graph already has the adapter's branch.
    """
    result: dict[str, list[tuple[PlannedSite, int]]] = defaultdict(list)
    tags: dict[str, set[Tag | None]] = {}
    for row in rows:
        for index, call in enumerate(row.site.calls):
            region = regions.get(call.region)
            if region is None:
                continue
            if call.region not in tags:
                tags[call.region] = {tag_of(node) for node in region.graph.nodes}
            added = _tag(relative(row.site.place, region.fqn), adapter, Role.ADD)
            if added not in tags[call.region]:
                result[call.region].append((row, index))
    return result


# --- observers ------------------------------------------------------------------------------------
# Shows the inputs of sites: a node before each operation passes its input to a function.
#
# A site may be a functional call or some rows of a weight, so it need not have a module. A module hook
# would miss it. A node in the graph does not.


See = Callable[[PlannedSite, torch.Tensor], None]
"""Function that gets a site and the vectors that it reads, [n, in]."""


def observed(capture: Capture, rows: Iterable[PlannedSite], see: See) -> Iterator[Region]:
    """Yield regions whose graphs also pass the input of each site to the function ``see``.

    Args:
        capture: A captured model, which is not changed.
        rows: The sites. Each must be a product of vectors with a matrix.
        see: Called whenever a site runs.
    """
    work: dict[str, list[tuple[PlannedSite, Call]]] = defaultdict(list)
    for row in rows:
        for call in row.site.calls:
            if call.region in capture.regions:
                work[call.region].append((row, call))
    for key, sites in work.items():
        region = capture.regions[key]
        graph = copy_graph(region.graph)
        nodes = {node.name: node for node in graph.nodes}
        for row, call in sites:
            _show(graph, nodes[call.input], nodes[call.output], _observer(row, call, see))
        safe = region.falls_back(row.site for row, _ in sites)
        yield region.with_graph(graph, fallback=safe)


def _show(
    graph: fx.Graph, value: fx.Node, before: fx.Node, observer: Callable[[torch.Tensor], None]
) -> None:
    with graph.inserting_before(before):
        graph.call_function(observer, (value,))


def _observer(row: PlannedSite, call: Call, see: See) -> Callable[[torch.Tensor], None]:
    def observer(x: torch.Tensor) -> None:
        value = x.detach()
        # With the weight on the left the inputs are columns.
        vectors = value.mT if call.left and value.dim() > 1 else value
        see(row, vectors.reshape(-1, vectors.shape[-1]))

    return observer
