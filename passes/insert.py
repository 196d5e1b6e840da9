"""Inserts the canonical branch at every planned site: ``x -> dropout -> A -> B -> scale -> add``.

Graphs are copied before they are edited. The model of the capture, which is the pipeline's own,
gets the factors as parameters beside the weight that they adapt; the names of its base parameters
do not change.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import fx, nn

from lora_fx.config import LoraConfig
from lora_fx.ops import AdapterFactors
from lora_fx.passes._factors import factor_names
from lora_fx.passes._fx import Branch
from lora_fx.passes._region import copy_graph
from lora_fx.passes.patterns import pattern_of
from lora_fx.types import (
    META_KEY,
    Capture,
    Factors,
    PassResult,
    Plan,
    PlannedSite,
    Region,
    Role,
    Site,
    Tag,
    join,
)

__all__ = ["Insert", "adapter_dtype"]


@dataclasses.dataclass(frozen=True)
class Insert:
    """The pass.

    Attributes:
        plan: What to insert.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "insert"
    plan: Plan
    adapter: str = "default"

    def __call__(self, capture: Capture) -> PassResult:
        """Adds factors and branches where the plan wants some and there are none yet."""
        rows = [row for row in self.plan.sites if not _inserted(capture, row, self.adapter)]
        if not rows:
            return PassResult(capture, False)
        # Those that are tied to the factors of another site come after that one.
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            if row.tied:
                _tie_factors(capture.model, row, self.plan, self.adapter)
            else:
                _add_factors(capture.model, row, self.plan.config, self.adapter)
        regions = dict(capture.regions)
        known: dict[Any, fx.Graph] = {}
        for fqn, work in _by_region(rows).items():
            region = regions[fqn]
            jobs = tuple(self._job(capture, region, row, index) for row, index in work)
            # Equal layers share their graph before the pass, and after it.
            key = (id(region.graph), jobs)
            if key not in known:
                known[key] = self._edited(region, jobs)
            # The module's own forward stands in only if every adapter is in a module below it, too.
            safe = all(any(call.region != fqn for call in row.site.calls) for row, _ in work)
            regions[fqn] = Region(fqn, region.module, known[key], region.fallback and safe)
        return PassResult(dataclasses.replace(capture, regions=regions), True)

    def _job(self, capture: Capture, region: Region, row: PlannedSite, index: int) -> _Job:
        site = row.site
        weight = capture.model.get_parameter(site.weight)
        names = factor_names(row)
        holder = _relative(site.holder, region.fqn)
        return _Job(
            output=site.calls[index].output,
            pattern=site.calls[index].pattern,
            part=_relative(site.place, region.fqn),
            factors=(join(holder, names[0], self.adapter), join(holder, names[1], self.adapter)),
            transposed=bool(row.tied),
            cast=adapter_dtype(weight) != weight.dtype or site.calls[index].cast,
            dropout=row.dropout,
            training=join(_relative(site.owner, region.fqn), "training"),
            scale=row.scale,
            padding=_padding(site),
            site=_local(site, region.fqn),
        )

    def _edited(self, region: Region, jobs: tuple[_Job, ...]) -> fx.Graph:
        graph = copy_graph(region.graph)
        nodes = {node.name: node for node in graph.nodes}
        edited = Region(region.fqn, region.module, graph)
        items: dict[str, fx.Node] = {}
        for job in jobs:
            base = nodes[job.output]
            build = Branch(
                graph,
                base,
                functools.partial(_tag, job.part, self.adapter),
                job.factors,
                cast=job.cast,
                dropout=job.dropout,
                training=job.training,
                items=items,
                transposed=job.transposed,
            )
            up = pattern_of(job).branch(job.site, base, edited, build)
            build.finish(up, job.scale, job.padding)
        graph.lint()
        return graph


@dataclasses.dataclass(frozen=True)
class _Job:
    """One branch to write, in names of the region: equal jobs on equal graphs give equal graphs."""

    output: str
    pattern: str
    part: str
    factors: tuple[str, str]
    transposed: bool
    cast: bool
    dropout: float
    training: str
    scale: float
    padding: tuple[int, int] | None
    site: Site


def _padding(site: Site) -> tuple[int, int] | None:
    """The output features of the operation before and after those of a part that is cut out of them."""
    if not site.part_of or site.rows is None:
        return None
    return site.rows[0], site.applied_shape[site.axis] - site.rows[1]


def _local(site: Site, region: str) -> Site:
    """The site as its region sees it, alike in layers that are alike."""
    return dataclasses.replace(
        site,
        name=_relative(site.name, region),
        weight=_relative(site.weight, region),
        bias=_relative(site.bias, region) if site.bias else None,
        calls=(),
        tied_to=(),
        parts=(),
        part_of="",
        head="",
    )


def _tag(part: str, adapter: str, role: Role) -> Tag:
    return Tag(part, role, "" if role is Role.BASE else adapter)


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """The factors' dtype: that of the weight, or fp32 for a weight of less precision."""
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32


def _inserted(capture: Capture, row: PlannedSite, adapter: str) -> bool:
    """Whether the adapter's branch is in the graph already."""
    call = row.site.calls[0]
    tag = _tag(_relative(row.site.place, call.region), adapter, Role.ADD)
    graph = capture.regions[call.region].graph
    return any(node.meta.get(META_KEY) == tag for node in graph.nodes)


def _by_region(rows: Iterable[PlannedSite]) -> dict[str, list[tuple[PlannedSite, int]]]:
    result: dict[str, list[tuple[PlannedSite, int]]] = defaultdict(list)
    for row in rows:
        for index, call in enumerate(row.site.calls):
            result[call.region].append((row, index))
    return result


def _relative(name: str, region: str) -> str:
    return name[len(region) + 1 :] if region else name


def _add_factors(model: nn.Module, row: PlannedSite, config: LoraConfig, adapter: str) -> None:
    site = row.site
    shapes = pattern_of(site).factors(site, row.rank)
    weight = model.get_parameter(site.weight)
    a, b = _initial(site, shapes, weight, config)
    for name, value in ((shapes.name_a, a), (shapes.name_b, b)):
        _factors(_holder(model, site), name).add(adapter, value)


def _tie_factors(model: nn.Module, row: PlannedSite, plan: Plan, adapter: str) -> None:
    """Registers the factors of an embedding a second time, at the head that shares its weight."""
    source = next(one.site for one in plan.sites if one.name == row.tied)
    for name in factor_names(row):
        value = model.get_submodule(source.holder).get_submodule(name).get_parameter(adapter)
        _factors(_holder(model, row.site), name).add(adapter, value)


def _factors(holder: nn.Module, name: str) -> AdapterFactors:
    if name not in holder._modules:
        holder.add_module(name, AdapterFactors())
    factors = holder.get_submodule(name)
    assert isinstance(factors, AdapterFactors)
    factors.train(holder.training)
    return factors


def _holder(model: nn.Module, site: Site) -> nn.Module:
    owner = model.get_submodule(site.owner)
    if site.holder == site.owner:
        return owner
    name = site.holder.rpartition(".")[2]
    if name not in owner._modules:
        owner.add_module(name, nn.Module().train(owner.training))
    return owner.get_submodule(name)


def _initial(
    site: Site, shapes: Factors, weight: torch.Tensor, config: LoraConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B at the start, from a generator of the site's own.

    Hu et al. 2021 (arXiv:2106.09685): one factor random, the other zero. The distributions are
    PEFT's.
    """
    dtype, a, b = adapter_dtype(weight), shapes.a, shapes.b
    if weight.device.type == "meta":
        return torch.empty(a, dtype=dtype, device="meta"), torch.empty(
            b, dtype=dtype, device="meta"
        )
    digest = hashlib.blake2b(f"{config.seed}:{site.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def uniform(shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
        # Kaiming with a = sqrt(5): the bound is 1/sqrt(fan_in).
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    if site.family == "embedding":
        random_b = normal(b, 1.0)
        first = normal(a, 1.0) if config.init_lora_weights is False else torch.zeros(a)
        second = random_b
    else:
        gaussian = config.init_lora_weights == "gaussian"
        first = normal(a, 1 / shapes.rank) if gaussian else uniform(a, shapes.fan_in[0])
        second = (
            uniform(b, shapes.fan_in[1]) if config.init_lora_weights is False else torch.zeros(b)
        )
    return first.to(weight.device, dtype), second.to(weight.device, dtype)
