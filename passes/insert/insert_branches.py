"""Inserts the canonical branch at every planned site: ``x -> dropout -> A -> B -> scale -> add``.

Where an operation has a branch already, that of another adapter, the new one is added to their sum.

Graphs are copied before they are edited. The factors that a branch reads are there already
(:mod:`lora_fx.passes.insert.add_factors`): nothing of the model is changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import fx

from lora_fx.ir.values import (
    META_KEY,
    Capture,
    PassResult,
    PlannedSite,
    Region,
    Role,
    Site,
    Tag,
    join,
    relative,
)
from lora_fx.passes.graph.region import copy_graph
from lora_fx.passes.insert.branch import Branch, Wiring
from lora_fx.passes.parameters.factors import adapter_dtype, factor_names
from lora_fx.passes.parameters.own import weight_at
from lora_fx.passes.patterns.registry import pattern_of

__all__ = ["Insert"]


@dataclasses.dataclass(frozen=True)
class Insert:
    """The pass.

    Attributes:
        rows: Where, and with what.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "insert"
    rows: tuple[PlannedSite, ...]
    adapter: str = "default"

    def __call__(self, capture: Capture) -> PassResult:
        """Adds branches where the plan wants some and there are none yet."""
        rows = [row for row in self.rows if not _inserted(capture, row, self.adapter)]
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
