"""Inserts the canonical branch at every planned site: ``x -> dropout -> A -> B -> scale -> add``.

Where an operation has a branch already, that of another adapter, the new one is added to their sum.

Graphs are copied before they are edited. The factors that a branch reads are there already
(:mod:`lora_fx.passes.insert.add_factors`): nothing of the model is changed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import (
    META_KEY,
    Call,
    Capture,
    Pass,
    PassResult,
    PlannedSite,
    Region,
    Role,
    Site,
    Tag,
    join,
    relative,
)
from lora_fx.kinds import makes_base_again
from lora_fx.passes.graph import arguments, copy_graph, target_of
from lora_fx.passes.parameters import adapter_dtype, factor_names, weight_at
from lora_fx.passes.patterns import pattern_of
from lora_fx.runtime import cast_like, dora, pad_features

__all__ = [
    "Branch",
    "Insert",
    "Wiring",
    "running_total",
]


_LINEAR = (F.linear, torch._C._nn.linear, torch.ops.aten.linear.default)


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a branch is made of, in names of the region.

    Attributes:
        site: The site, as the region sees it.
        call: Where its weight is applied.
        a, b: The factors.
        magnitude: The magnitude of DoRA; empty for none.
        bias: The bias of B; empty for none.
        scale: The factor of the branch.
        dropout: Probability, on the branch's input.
        training: The attribute that says whether there is dropout now.
        cast: Whether the factors are cast to the base output's dtype.
        transposed: Whether the factors are stored transposed.
        padding: How many output features of the base operation come before and after those of the
            branch; None if it has them all.
    """

    site: Site
    call: Call
    a: str
    b: str
    magnitude: str = ""
    bias: str = ""
    scale: float = 1.0
    dropout: float = 0.0
    training: str = "training"
    cast: bool = False
    transposed: bool = False
    padding: tuple[int, int] | None = None


def running_total(base: fx.Node) -> fx.Node:
    """The base operation with all branches that are added to it so far: the node that others read."""
    total = base
    while True:
        sums = (user for user in total.users if _adds(user) and user.args[0] is total)
        following = next(sums, None)
        if following is None:
            return total
        total = following


def _adds(node: fx.Node) -> bool:
    tag = node.meta.get(META_KEY)
    return isinstance(tag, Tag) and tag.role is Role.ADD


class Branch:
    """Writes the nodes of one adapter's branch, right after what it is added to.

    The factors are read where they are first used.
    """

    def __init__(
        self,
        graph: fx.Graph,
        base: fx.Node,
        tag: Callable[[Role], Tag],
        wiring: Wiring,
        items: dict[str, fx.Node] | None = None,
    ) -> None:
        self._graph = graph
        self._base = base
        self._total = running_total(base)
        self._tag = tag
        self._wiring = wiring
        self._next = self._total.next
        self.made: list[fx.Node] = []
        self._known: dict[str, fx.Node] = {}
        self._items = {} if items is None else items
        base.meta[META_KEY] = tag(Role.BASE)

    @property
    def a(self) -> fx.Node:
        """A, in the dtype in which the branch computes."""
        return self._once("a", lambda: self._cast(self._wiring.a))

    @property
    def b(self) -> fx.Node:
        """B, in the dtype in which the branch computes; with DoRA, scaled and multiplied by the gain."""
        if not self._wiring.magnitude:
            return self._once("b", lambda: self._cast(self._wiring.b))
        return self._once("b", self._steered)

    @property
    def bias(self) -> fx.Node | None:
        """What the operation that applies B takes for its bias."""
        if self._wiring.bias:
            return self._once("bias", lambda: self._cast(self._wiring.bias))
        if self._wiring.magnitude and self._wiring.call.bias and self._wiring.padding is None:
            return self._once("bias", lambda: self._shift(self._constant, self._base_bias))
        return None

    def item(self, letter: str, index: int) -> fx.Node:
        """One expert's matrix of a factor.

        All branches of a graph take it from one ``unbind``: the gradient of a selection is as large as
        what is selected from, and there would be one for each expert.
        """
        name = self._wiring.a if letter == "a" else self._wiring.b
        if name not in self._items:
            factor = self.a if letter == "a" else self.b
            self._items[name] = self.call(Role.FACTOR, torch.unbind, factor)
        return self.call(Role.FACTOR, operator.getitem, self._items[name], index)

    def dropped(self, x: fx.Node) -> fx.Node:
        """``x`` after dropout that follows the owner's mode; ``x`` itself where there is none."""
        dropout = self._wiring.dropout
        if not dropout:
            return x
        training = self._make(Role.DROPOUT, "get_attr", self._wiring.training)
        return self._make(Role.DROPOUT, "call_function", F.dropout, x, dropout, training)

    def call(self, role: Role, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A tagged ``call_function`` node."""
        return self._make(role, "call_function", target, *args, **kwargs)

    def finish(self, up: fx.Node) -> fx.Node:
        """Adds the branch to what is there, and puts the sum in its place.

        Args:
            up: What the pattern has written.
        """
        total = self._rescaled(up) if self._wiring.magnitude else self._added(up)
        mine = set(self.made)
        self._total.replace_all_uses_with(total, delete_user_cb=lambda user: user not in mine)
        return total

    # --- plain ------------------------------------------------------------------------------------

    def _added(self, up: fx.Node) -> fx.Node:
        if self._wiring.bias and "bias" not in self._known:
            assert self.bias is not None
            up = self.call(Role.UP, operator.add, up, self._spread(self.bias))
        scaled = self.call(Role.SCALE, operator.mul, up, self._wiring.scale)
        return self.call(Role.ADD, operator.add, self._total, self._padded(scaled))

    def _padded(self, up: fx.Node) -> fx.Node:
        if self._wiring.padding is None:
            return up
        return self.call(Role.PAD, pad_features, up, *self._wiring.padding)

    # --- DoRA -------------------------------------------------------------------------------------

    @property
    def _gain(self) -> fx.Node:
        return self._once("gain", self._new_gain)

    @property
    def _constant(self) -> fx.Node:
        """The gain as the branch has it: held, where its gradient comes from the sum."""
        if not self._from_output:
            return self._gain
        return self._once("held", lambda: self.call(Role.MAGNITUDE, dora.held, self._gain))

    @property
    def _from_output(self) -> bool:
        return self._first and not self._again

    @property
    def _first(self) -> bool:
        return self._total is self._base and self._wiring.padding is None

    @property
    def _again(self) -> bool:
        """Whether the base product is made again for the gradient of the magnitude."""
        again = makes_base_again(self._wiring.site)
        return self._first and again and target_of(self._base) in _LINEAR

    @property
    def _base_bias(self) -> fx.Node:
        names = {node.name: node for node in self._base.all_input_nodes}
        return names[self._wiring.call.bias]

    def _new_gain(self) -> fx.Node:
        wiring, site = self._wiring, self._wiring.site
        return self.call(
            Role.MAGNITUDE,
            dora.gain,
            self._make(Role.MAGNITUDE, "get_attr", wiring.magnitude),
            self._make(Role.MAGNITUDE, "get_attr", site.weight),
            self._turned(wiring.a),
            self._turned(wiring.b),
            wiring.scale,
            site.layout,
            site.groups,
            site.view,
            site.rows,
            *(() if site.order is None else (site.order,)),
        )

    def _steered(self) -> fx.Node:
        factor, scale = self._turned(self._wiring.b), self._wiring.scale
        factor = self.call(Role.SCALE, dora.steered, factor, self._constant, scale)
        if self._wiring.cast:
            factor = self.call(Role.CAST, cast_like, factor, self._base)
        return factor

    def _rescaled(self, up: fx.Node) -> fx.Node:
        wiring = self._wiring
        gains = self._gain
        if wiring.padding is not None:
            up = self._padded(up)
            gains = self.call(Role.PAD, F.pad, gains, wiring.padding, "constant", 1.0)
        met = self._spread(gains)
        bias = self._met_bias() if wiring.call.bias else None
        if bias is not None and "bias" not in self._known:
            constant = self._constant if wiring.padding is None else gains
            shift = self._shift(self._spread(constant), bias)
            up = self.call(Role.MAGNITUDE, operator.add, up, shift)
        if self._again:
            named = arguments(self._base, "input weight bias=None")
            operands = (named["input"], named["weight"], named["bias"])
            return self.call(Role.ADD, dora.recomputed, self._base, up, met, *operands)
        if self._from_output:
            kept = (self._spread(self._constant), bias)
            return self.call(Role.ADD, dora.rescaled, self._base, None, up, met, *kept)
        base = None if self._total is self._base else self._base
        return self.call(Role.ADD, dora.rescaled, self._total, base, up, met)

    def _met_bias(self) -> fx.Node:
        bias = self._base_bias
        return self._spread(bias) if self._wiring.site.family == "conv" else bias

    def _shift(self, gains: fx.Node, bias: fx.Node) -> fx.Node:
        return self.call(Role.MAGNITUDE, dora.shifted, bias, gains, self._base)

    # --- nodes ------------------------------------------------------------------------------------

    def _spread(self, vector: fx.Node) -> fx.Node:
        """A vector of the output features as it meets the output."""
        call = self._wiring.call
        if call.axes == (-1,):
            return vector
        made = (vector, self._base, call.axes, call.sizes)
        return self._once(
            f"spread {vector.name}", lambda: self.call(Role.MAGNITUDE, dora.spread, *made)
        )

    def _turned(self, name: str) -> fx.Node:
        """A factor, rank where it belongs, in its own dtype."""
        factor = self._once(name, lambda: self._make(Role.FACTOR, "get_attr", name))
        if not self._wiring.transposed:
            return factor
        return self._once(f"turned {name}", lambda: self.call(Role.FACTOR, torch.t, factor))

    def _cast(self, name: str) -> fx.Node:
        factor = self._once(name, lambda: self._make(Role.FACTOR, "get_attr", name))
        if self._wiring.cast:
            # The factors are small: they follow the activation, never the other way round.
            factor = self.call(Role.CAST, cast_like, factor, self._base)
        if self._wiring.transposed and name != self._wiring.bias:
            factor = self.call(Role.FACTOR, torch.t, factor)
        return factor

    def _once(self, key: str, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _make(self, role: Role, op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._next):
            node = self._graph.create_node(op, target, args, kwargs)
        node.meta[META_KEY] = self._tag(role)
        self.made.append(node)
        return node


@dataclasses.dataclass(frozen=True)
class Insert(Pass):
    """The pass.

    Attributes:
        rows: Where, and with what; None for the sites of the capture's plan.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "insert"
    rows: tuple[PlannedSite, ...] | None = None
    adapter: str = "default"

    def requires(self, capture: Capture) -> str | None:
        """A plan has to be there."""
        return "nothing is planned" if self.rows is None and capture.plan is None else None

    def __call__(self, capture: Capture) -> PassResult:
        """Adds branches where the plan wants some and there are none yet."""
        planned = self.rows
        if planned is None:
            planned = capture.plan.sites if capture.plan is not None else ()
        rows = [row for row in planned if not _inserted(capture, row, self.adapter)]
        if not rows:
            return PassResult(capture, False)
        regions = dict(capture.regions)
        known: dict[Any, fx.Graph] = {}
        for name, work in _by_region(rows, capture.regions).items():
            region = regions[name]
            jobs = tuple(self._job(capture, region, row, index) for row, index in work)
            # Equal layers share their graph before the pass, and after it.
            key = (id(region.graph), jobs)
            if key not in known:
                known[key] = self._edited(region, jobs)
            safe = region.falls_back(row.site for row, _ in work)
            regions[name] = dataclasses.replace(region, graph=known[key], fallback=safe)
        return PassResult(dataclasses.replace(capture, regions=regions), True)

    def _job(self, capture: Capture, region: Region, row: PlannedSite, index: int) -> _Job:
        site, call = row.site, row.site.calls[index]
        weight = weight_at(capture.model, site.weight)
        names = factor_names(row)
        holder = relative(site.holder, region.fqn)

        def factor(name: str) -> str:
            return join(holder, name, self.adapter) if name else ""

        wiring = Wiring(
            site=_local(site, region.fqn),
            call=dataclasses.replace(call, region=""),
            a=factor(names.a),
            b=factor(names.b),
            magnitude=factor(names.magnitude),
            bias=factor(names.bias),
            scale=row.scale,
            dropout=row.dropout,
            training=join(relative(site.owner, region.fqn), "training"),
            cast=adapter_dtype(weight) != weight.dtype or call.cast,
            transposed=bool(row.tied),
            padding=_padding(site),
        )
        return _Job(relative(site.place, region.fqn), wiring)

    def _edited(self, region: Region, jobs: tuple[_Job, ...]) -> fx.Graph:
        graph = copy_graph(region.graph)
        nodes = {node.name: node for node in graph.nodes}
        edited = dataclasses.replace(region, graph=graph)
        items: dict[str, fx.Node] = {}
        for job in jobs:
            wiring = job.wiring
            base = nodes[wiring.call.output]
            tag = functools.partial(_tag, job.part, self.adapter)
            build = Branch(graph, base, tag, wiring, items)
            build.finish(pattern_of(wiring.call).branch(wiring.site, base, edited, build))
        graph.lint()
        return graph


@dataclasses.dataclass(frozen=True)
class _Job:
    """One branch to write, in names of the region: equal jobs on equal graphs give equal graphs."""

    part: str
    wiring: Wiring


def _padding(site: Site) -> tuple[int, int] | None:
    """The output features of the operation before and after those of a part that is cut out of them."""
    if not site.part_of or site.rows is None:
        return None
    return site.rows[0], site.applied_shape[site.axis] - site.rows[1]


def _local(site: Site, region: str) -> Site:
    """The site as its region sees it, alike in layers that are alike."""
    return dataclasses.replace(
        site,
        name=relative(site.name, region),
        weight=relative(site.weight, region),
        bias=relative(site.bias, region) if site.bias else None,
        calls=(),
        tied_to=(),
        parts=(),
        part_of="",
        head="",
    )


def _tag(part: str, adapter: str, role: Role) -> Tag:
    return Tag(part, role, "" if role is Role.BASE else adapter)


def _inserted(capture: Capture, row: PlannedSite, adapter: str) -> bool:
    """Whether the adapter's branch is in the graph already."""
    for call in row.site.calls:
        if call.region in capture.regions:
            region = capture.regions[call.region]
            tag = _tag(relative(row.site.place, region.fqn), adapter, Role.ADD)
            graph = region.graph
            return any(node.meta.get(META_KEY) == tag for node in graph.nodes)
    return False


def _by_region(
    rows: Iterable[PlannedSite], regions: Mapping[str, Region]
) -> dict[str, list[tuple[PlannedSite, int]]]:
    """What to insert where. A graph that lay over other regions may have been taken off since."""
    result: dict[str, list[tuple[PlannedSite, int]]] = defaultdict(list)
    for row in rows:
        for index, call in enumerate(row.site.calls):
            if call.region in regions:
                result[call.region].append((row, index))
    return result
