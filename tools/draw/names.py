"""Pictures of plans, merges, extractions and adapter folders: trees of the names in them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_fx.errors import CheckpointError
from lora_fx.extraction import ExtractionReport
from lora_fx.ir import Plan, PlannedSite, PlannedTokens, Rejection, Site, Skipped, join
from lora_fx.passes.merge import MergeReport
from lora_fx.tools.adapter_folder import SiteFigures, figures_of, read_folder
from lora_fx.tools.draw.picture import (
    Box,
    Branch,
    Kind,
    Picture,
    SiteRow,
    State,
    human,
    name_of,
    runs,
    share_of,
    times,
)
from lora_fx.tools.draw.sites import (
    cost_facts,
    costs_of,
    flops_of,
    rows_of_plan,
    targets_of,
    unit_of,
)

__all__ = ["picture_of_extraction", "picture_of_folder", "picture_of_merge", "picture_of_plan"]

_CHANGE = "‖ΔW‖ / ‖W‖"
"""Label of a change's size on the page."""

_KEPT = "share of ‖ΔW‖² kept"

_Facts = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The contents of a box that has no boxes inside, for one name.

    Attributes:
        kind, caption, facts, branches, marks, state: As in :class:`~lora_fx.tools.draw.picture.Box`.
        parameters: Number of trainable elements.
        adapted: True if it counts as an adapted site.
        alike: Further values that must be equal for two names to be drawn as one.
        weights: Names of the parameters that it stands for.
        linear: True if it is a linear operation of a model all of whose linear operations are drawn.
    """

    kind: Kind = Kind.LEAF
    caption: str = ""
    facts: _Facts = ()
    branches: tuple[Branch, ...] = ()
    marks: tuple[str, ...] = ()
    state: State = State.NONE
    parameters: int = 0
    adapted: bool = False
    alike: tuple[object, ...] = ()
    weights: tuple[str, ...] = ()
    linear: bool = False

    def look(self) -> object:
        """Return a value that is equal for names that look the same in the picture."""
        return (self.kind, self.caption, self.branches, self.marks, self.alike)


@dataclasses.dataclass
class _Name:
    """A node of the tree of names: its contents, and the names below it."""

    leaf: _Leaf | None = None
    below: dict[str, _Name] = dataclasses.field(default_factory=dict)

    def look(self) -> object:
        """Return a value that is equal for names that look the same, with all names below them."""
        below = tuple((name, child.look()) for name, child in self.below.items())
        return (None if self.leaf is None else self.leaf.look(), below)

    def leaves(self) -> Iterator[_Leaf]:
        """Yield the contents of the name and of all names below it."""
        if self.leaf is not None:
            yield self.leaf
        for child in self.below.values():
            yield from child.leaves()


def _tree(named: Iterable[tuple[str, _Leaf]]) -> Box:
    """Return the box of a tree of names. If a name occurs twice, the first contents count."""
    root = _Name()
    for name, leaf in named:
        node = root
        for atom in name.split(".") if name else ():
            node = node.below.setdefault(atom, _Name())
        if node.leaf is None:
            node.leaf = leaf
    return _painted([root], [""], itertools.count())


def _painted(nodes: Sequence[_Name], fqns: Sequence[str], ids: Iterator[int]) -> Box:
    """Return the box of the first of several names that look the same, which stands for all."""
    node, fqn, box_id = nodes[0], fqns[0], f"n{next(ids)}"
    names, below = list(node.below), list(node.below.values())
    children = tuple(
        _painted([below[i] for i in run], [join(fqn, names[i]) for i in run], ids)
        for run in runs(names, [repr(child.look()) for child in below])
    )
    leaf = node.leaf or _Leaf(Kind.OPAQUE)
    facts = leaf.facts
    if len(fqns) > 1:
        facts = (("stands for", f"{len(fqns)} equal, the last is {fqns[-1]}"), *facts)
    inside = [each for name in nodes for each in name.leaves()]
    return Box(
        id=box_id,
        kind=Kind.OPAQUE if children else leaf.kind,
        name=name_of(fqns),
        caption=leaf.caption,
        fqn=fqn,
        facts=(("name", fqn or "(root)"), *facts),
        children=children,
        repeats=tuple(fqns) if len(fqns) > 1 else (),
        sites=sum(each.adapted for each in inside),
        linear=sum(each.linear for each in inside),
        trainable=sum(each.parameters for each in inside),
        branches=leaf.branches,
        marks=leaf.marks,
        state=leaf.state,
        parameters=leaf.weights,
    )


def picture_of_plan(plan: Plan) -> Picture:
    """Draw a plan: adapted names, names trained in other ways, and the reasons why others are not adapted."""
    in_full = _Leaf(facts=(("trained", "in full"),), marks=("trained in full",), state=State.FULL)
    skipped = {row.site.name for row in plan.skipped}
    named = [
        *((row.name, _of_site(row)) for row in plan.sites),
        *(
            (name, dataclasses.replace(in_full, linear=name in skipped))
            for name in plan.saved_modules
        ),
        *((row.name, _of_tokens(row)) for row in plan.tokens),
        *((row.site.name, _of_skipped(row)) for row in plan.skipped),
        *((row.name, _of_rejection(row)) for row in plan.rejections),
    ]
    box = _tree(named)
    sites = [*(row.site for row in plan.sites), *(row.site for row in plan.skipped)]
    base = plan.sample_flops
    # Positions of a convolution are not tokens.
    if plan.sample_cost is None and not any(site.family == "conv" for site in sites):
        base = flops_of(sites)
    share = plan.flops / base if base else None
    return Picture(
        title="Plan",
        facts=(
            ("sites", str(len(plan.sites))),
            ("not selected", str(len(plan.skipped))),
            ("cannot be adapted", str(len(plan.rejections))),
            ("parameters", human(plan.total_parameters)),
            ("trainable", share_of(plan.trainable_parameters, plan.total_parameters)),
            *costs_of(plan.flops, plan.saved, plan.unit, share),
            ("captured by", plan.frontend),
        ),
        root=box,
        notes=tuple(f"matched nothing: {target}" for target in plan.unmatched),
        adapters=("",),
        sites=rows_of_plan(plan),
        targets=targets_of(sites, plan.rejections, plan.config),
        config=plan.config,
        counted=False,
        unit=unit_of(plan.sites),
    )


def _of_site(row: PlannedSite) -> _Leaf:
    site = row.site
    shape = times(site.shape)
    return _Leaf(
        kind=Kind.SITE,
        caption=shape,
        facts=(
            ("pattern", site.pattern),
            ("weight", f"{site.place} {shape}"),
            *((("stored", str(site.quantized)),) if site.quantized is not None else ()),
            ("rank", str(row.rank)),
            ("scale", f"{row.scale:g}"),
            ("dropout", f"{row.dropout:g}"),
            *cost_facts(row),
            ("calls", str(len(site.calls))),
        ),
        branches=(Branch("", row.rank or None, row.scale, row.dropout, row.kind),),
        marks=_marks(row),
        state=State.ADAPTED,
        parameters=row.parameters,
        adapted=True,
        alike=(site.pattern, row.alpha),
        weights=_weights(site),
        linear=True,
    )


def _of_tokens(row: PlannedTokens) -> _Leaf:
    words = f"{len(row.indices)} rows"
    return _Leaf(
        caption=times(row.site.shape),
        facts=(("trained", words),),
        marks=(words,),
        state=State.ROWS,
        linear=True,
        parameters=row.parameters,
    )


def _of_skipped(row: Skipped) -> _Leaf:
    site = row.site
    facts = (("pattern", site.pattern), ("weight", f"{site.place} {times(site.shape)}"))
    return _Leaf(
        kind=Kind.SKIPPED,
        caption=_short(row.reason),
        facts=(*facts, ("not selected", row.reason)),
        marks=_marks(row),
        state=State.BASE,
        weights=_weights(site),
        linear=True,
    )


def _of_rejection(row: Rejection) -> _Leaf:
    facts = (("cannot be adapted", row.reason),)
    return _Leaf(Kind.REJECTED, _short(row.reason), facts, state=State.REFUSED, linear=True)


def _weights(site: Site) -> tuple[str, ...]:
    """Return the name of the weight below the site's, if it has one."""
    below = f"{site.name}."
    return (site.weight.removeprefix(below),) if site.weight.startswith(below) else ()


def _marks(row: PlannedSite | Skipped) -> tuple[str, ...]:
    stored = (row.site.quantized.scheme,) if row.site.quantized is not None else ()
    return (*stored, "tied") if row.site.tied_to else stored


def _short(reason: str) -> str:
    return reason if len(reason) <= 40 else reason[:39].rstrip() + "…"


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def picture_of_merge(report: MergeReport) -> Picture:
    """Draw a merge: the weights that it changed, by how much, and how exactly."""
    named = []
    rows = []
    for site in report.sites:
        lost = site.requantization_error
        share = None if math.isnan(site.relative_change) else site.relative_change
        ulp = None if site.requantized or math.isnan(site.max_ulp) else site.max_ulp
        error = "" if ulp is None else f"{ulp:.4f}"
        measured = (
            (_CHANGE, "" if share is None else f"{share:.3g}"),
            ("merge error, ulp", error),
            ("quantization error", f"{lost:.3g}" if site.requantized else ""),
            ("share of ΔW kept", _figure(site.kept)),
            ("entries that moved", _figure(site.moved)),
            ("output error / effect", _figure(site.output_error)),
        )
        facts = (
            ("merged", ", ".join(site.adapters)),
            *(figure for figure in measured if figure[1]),
        )
        caption = "" if share is None else f"{_CHANGE} {share:.3g}"
        marks = ("quantized again",) if site.requantized else ()
        named.append((site.name, _Leaf(Kind.SITE, caption, facts, marks=marks, adapted=True)))
        row = SiteRow(site.name, State.ADAPTED, adapter=", ".join(site.adapters), share=share)
        again = lost if site.requantized else None
        kept, outputs = (
            None if math.isnan(value) else value for value in (site.kept, site.output_error)
        )
        rows.append(
            dataclasses.replace(row, error=ulp, lost=again, kept=kept, output_error=outputs)
        )
    named += [(name.removesuffix(".weight"), _Leaf(marks=("untied",))) for name in report.untied]
    rounded = [site for site in report.sites if not site.requantized]
    ulps = "" if not rounded or math.isnan(report.max_ulp) else f"{report.max_ulp:.4f} ulp"
    known = (
        ("weights merged", str(len(report.sites))),
        ("largest error", ulps),
        ("share of ΔW kept", _figure(report.kept)),
    )
    changes = tuple(fact for fact in known if fact[1])
    root = _tree(named)
    return Picture("Merge", changes, root, sites=tuple(rows), adapters=("",), counted=False)


def picture_of_extraction(report: ExtractionReport) -> Picture:
    """Draw an extraction: the operations that changed, their ranks, and the shares kept."""
    named = []
    rows = []
    for site in report.sites:
        facts = (
            ("rank", f"{site.rank} of {site.largest_rank}"),
            (_CHANGE, f"{site.relative_change:.3g}"),
            (_KEPT, f"{site.kept:.3g}"),
            ("‖ΔW - s·BA‖ / ‖ΔW‖", f"{site.error:.3g}"),
            ("output error / effect", _figure(site.output_error)),
        )
        leaf = _Leaf(
            Kind.SITE,
            f"rank {site.rank}, {100 * site.kept:.3g} % kept",
            tuple(fact for fact in facts if fact[1]),
            adapted=True,
        )
        named.append((site.name, leaf))
        outputs = None if math.isnan(site.output_error) else site.output_error
        row = SiteRow(site.name, State.ADAPTED, adapter="extracted", rank=site.rank, scale=1.0)
        row = dataclasses.replace(
            row, share=site.relative_change, kept=site.kept, output_error=outputs
        )
        rows.append(row)
    named += [(name, _Leaf(marks=("in full",))) for name in (*report.saved_modules, *report.values)]
    named += [(name, _Leaf(marks=("left out",))) for name in report.left_out]
    known = (
        ("sites", str(len(report.sites))),
        ("parameters", human(report.parameters)),
        (_KEPT, _figure(report.kept)),
    )
    return Picture(
        "Extraction",
        tuple(fact for fact in known if fact[1]),
        _tree(named),
        sites=tuple(rows),
        adapters=("extracted",),
        counted=False,
    )


def picture_of_folder(folder: Path) -> Picture:
    """Draw the contents of an adapter folder: ranks, scales and effective ranks, without the base.

    Raises:
        CheckpointError: If the folder has no adapter, or an unreadable one.
    """
    config, pairs, shapes = read_folder(folder)
    named: list[tuple[str, _Leaf]] = []
    rows = []
    for name, pair in pairs.items():
        try:
            figures = figures_of(name, pair, config, folder)
        except CheckpointError as error:
            damage, size = (
                (("damaged", str(error)),),
                sum(tensor.numel() for tensor in pair.values()),
            )
            named.append((name, _Leaf(Kind.SITE, facts=damage, parameters=size, adapted=True)))
            continue
        leaf, row = _of_figures(figures, float(config.lora_dropout))
        named.append((name, leaf))
        rows.append(row)
    for key, shape in shapes.items():
        size = math.prod(shape)
        leaf = _Leaf(caption=times(shape), marks=("in full",), state=State.FULL, parameters=size)
        named.append((key, leaf))
    facts = (
        ("sites", str(len(pairs))),
        ("parameters", human(sum(leaf.parameters for _, leaf in named))),
        ("r", str(config.r)),
        ("lora_alpha", f"{config.lora_alpha:g}"),
    )
    root = _tree(named)
    return Picture(
        title=folder.name,
        facts=facts,
        root=root,
        adapters=("",),
        sites=tuple(rows),
        counted=False,
    )


def _of_figures(figures: SiteFigures, dropout: float) -> tuple[_Leaf, SiteRow]:
    out, into = figures.shape
    learned = math.isfinite(figures.norm) and figures.norm > 0
    effective = figures.effective_rank if learned else None
    facts = [
        ("A", f"{times((figures.rank, into))}, {figures.dtype}"),
        ("B", f"{times((out, figures.rank))}, {figures.dtype}"),
        ("‖ΔW‖", f"{figures.norm:.3g}"),
        *([("effective rank", f"{effective:.3g}")] if effective is not None else []),
        *([("experts", str(figures.experts))] if figures.experts > 1 else []),
    ]
    leaf = _Leaf(
        kind=Kind.SITE,
        caption=f"B {times((out, figures.rank))} · A {times((figures.rank, into))}",
        facts=tuple(facts),
        branches=(Branch("", figures.rank, figures.scale, dropout),),
        state=State.ADAPTED,
        parameters=figures.parameters,
        adapted=True,
        weights=("lora_A", "lora_B"),
    )
    row = SiteRow(
        figures.name,
        State.ADAPTED,
        rank=figures.rank,
        scale=figures.scale,
        dropout=dropout,
        parameters=figures.parameters,
        effective=effective,
    )
    return leaf, row
