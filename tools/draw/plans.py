"""Plans as pictures: the tree of names, what is adapted in it, and why the rest is not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from lora_fx.ir import Plan, PlannedSite, Rejection, Skipped, join
from lora_fx.tools.draw.picture import (
    Box,
    Branch,
    Kind,
    Picture,
    State,
    human,
    name_of,
    occurring,
    runs,
    share_of,
    times,
)
from lora_fx.tools.draw.sites import rows_of_plan

__all__ = ["picture_of_plan"]


_LEGEND: tuple[tuple[Kind, str], ...] = (
    (Kind.SITE, "adapted"),
    (Kind.SKIPPED, "not selected"),
    (Kind.REJECTED, "cannot be adapted"),
)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What is trained without an adapter: a module in full, rows of an embedding."""

    state: State
    words: str
    parameters: int = 0


_Row = PlannedSite | Skipped | Rejection | _Trained


@dataclasses.dataclass
class _Name:
    """A node of the tree of names: what is at it, and what is below it."""

    row: _Row | None = None
    below: dict[str, _Name] = dataclasses.field(default_factory=dict)

    def signature(self) -> object:
        """Equal where two names look the same in the picture."""
        below = tuple((name, child.signature()) for name, child in self.below.items())
        return (_look(self.row), below)


def picture_of_plan(plan: Plan) -> Picture:
    """Draws a plan."""
    root = _Name()
    rows: list[tuple[str, _Row]] = [
        *((row.name, row) for row in plan.sites),
        *((name, _Trained(State.FULL, "trained in full")) for name in plan.saved_modules),
        *(
            (row.name, _Trained(State.ROWS, f"{len(row.indices)} rows trained", row.parameters))
            for row in plan.tokens
        ),
        *((row.site.name, row) for row in plan.skipped),
        *((row.name, row) for row in plan.rejections),
    ]
    for name, row in rows:
        place = root
        for atom in name.split(".") if name else ():
            place = place.below.setdefault(atom, _Name())
        if place.row is None:
            place.row = row
    box = _painted([root], [""], itertools.count())
    return Picture(
        title="Plan",
        facts=(
            ("sites", str(len(plan.sites))),
            ("not selected", str(len(plan.skipped))),
            ("cannot be adapted", str(len(plan.rejections))),
            ("parameters", human(plan.total_parameters)),
            ("trainable", share_of(plan.trainable_parameters, plan.total_parameters)),
            ("captured by", plan.frontend),
        ),
        root=box,
        legend=occurring(_LEGEND, box),
        notes=tuple(f"matched nothing: {target}" for target in plan.unmatched),
        adapters=("",),
        sites=rows_of_plan(plan),
    )


def _painted(nodes: Sequence[_Name], fqns: Sequence[str], ids: Iterator[int]) -> Box:
    """The box of the first of some names, which stands for all: they look the same."""
    node, fqn, box_id = nodes[0], fqns[0], f"n{next(ids)}"
    names, below = list(node.below), list(node.below.values())
    children = tuple(
        _painted([below[i] for i in run], [join(fqn, names[i]) for i in run], ids)
        for run in runs(names, [repr(child.signature()) for child in below])
    )
    kind, caption, facts = _describe(node.row)
    row = node.row
    if len(fqns) > 1:
        facts = (("stands for", f"{len(fqns)} equal, the last is {fqns[-1]}"), *facts)
    planned = [row for each in nodes for row in _rows(each) if isinstance(row, PlannedSite)]
    return Box(
        id=box_id,
        kind=kind if not children else Kind.OPAQUE,
        name=name_of(fqns),
        caption=caption,
        fqn=fqn,
        facts=(("name", fqn or "(root)"), *facts),
        children=children,
        repeats=tuple(fqns) if len(fqns) > 1 else (),
        sites=len(planned),
        trainable=sum(
            each.parameters
            for name in nodes
            for each in _rows(name)
            if isinstance(each, PlannedSite | _Trained)
        ),
        branches=(_branch(row),) if isinstance(row, PlannedSite) else (),
        marks=_marks(row),
        state=_state(row),
    )


def _branch(row: PlannedSite) -> Branch:
    return Branch("", row.rank or None, row.scale, row.dropout, row.kind)


def _marks(row: _Row | None) -> tuple[str, ...]:
    if isinstance(row, _Trained):
        return (row.words,)
    site = row.site if isinstance(row, PlannedSite | Skipped) else None
    if site is None:
        return ()
    stored = (site.quantized.scheme,) if site.quantized is not None else ()
    return (*stored, "tied") if site.tied_to else stored


def _state(row: _Row | None) -> State:
    if isinstance(row, _Trained):
        return row.state
    known = ((PlannedSite, State.ADAPTED), (Skipped, State.BASE), (Rejection, State.REFUSED))
    return next((state for cls, state in known if isinstance(row, cls)), State.NONE)


def _rows(node: _Name) -> Iterator[_Row]:
    if node.row is not None:
        yield node.row
    for child in node.below.values():
        yield from _rows(child)


def _short(reason: str) -> str:
    return reason if len(reason) <= 40 else reason[:39].rstrip() + "…"


def _look(row: _Row | None) -> object:
    kind, caption, _ = _describe(row)
    if isinstance(row, PlannedSite):
        return (kind, caption, row.site.pattern, row.rank, row.alpha, row.scale, row.dropout)
    return (kind, caption, _marks(row))


def _describe(
    row: _Row | None,
) -> tuple[Kind, str, tuple[tuple[str, str], ...]]:
    if isinstance(row, PlannedSite):
        site = row.site
        shape = times(site.shape)
        return (
            Kind.SITE,
            shape,
            (
                ("pattern", site.pattern),
                ("weight", f"{site.place} {shape}"),
                ("rank", str(row.rank)),
                ("scale", f"{row.scale:g}"),
                ("dropout", f"{row.dropout:g}"),
                ("trainable", f"{row.parameters:,}"),
                ("extra FLOPs a token", f"{row.flops:,}"),
                ("saved for backward", f"{row.saved:,} bytes a token"),
                ("calls", str(len(site.calls))),
            ),
        )
    if isinstance(row, Skipped):
        site = row.site
        shape = times(site.shape)
        facts = (("pattern", site.pattern), ("weight", f"{site.place} {shape}"))
        return Kind.SKIPPED, _short(row.reason), (*facts, ("not selected", row.reason))
    if isinstance(row, Rejection):
        return Kind.REJECTED, _short(row.reason), (("cannot be adapted", row.reason),)
    if isinstance(row, _Trained):
        return Kind.LEAF, "", (("trained", row.words),)
    return Kind.OPAQUE, "", ()
